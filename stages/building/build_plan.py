"""What a build has to do: every training pair with its key, and the work units of those not yet scored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .pair_collection import SpooledPairs

UNITS_PER_WORKER = 16
MIN_UNIT_TOKENS = 16_384
MAX_UNIT_TOKENS = 1_048_576
MAX_UNIT_PAIRS = 262_144
"""With the bound on tokens it bounds the row groups of a shard, and with them its footer, whatever the pairs are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Pairs that one worker scores and writes as one shard; the grain of durability and of resuming.

    Attributes:
        start: First place in :meth:`ScoringPlan.spool_order`.
        stop: One past the last.
    """

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringPlan:
    """All that a scoring process is told; JSON beside the spool.

    Attributes:
        cache: The cache folder.
        model_folder: The reference's files.
        adapter_folder: Files of a peft adapter on top of it; None without one.
        quantization: What the weights are quantized to; None for weights as they are.
        dtype: Precision of weights and forward passes.
        attention: The attention kernel.
        trust_remote_code: Whether the model's own Python code may run.
        zero_stage: 3 where the weights are partitioned over all scoring processes, else 0.
        tokens_per_batch: Token budget of one forward pass; None to go by the device.
        token_logps: Whether the log-probability of each scored token is kept too.
        spool: The file with the pairs' tokens.
        order: The file with spool indices in the order the units cut through, which no process needs whole.
        longest: Spool index of the longest pair, which is tried first; None where there is nothing to score.
        units: The work units.
    """

    cache: str
    model_folder: str
    adapter_folder: str | None
    quantization: str | None
    dtype: str
    attention: str
    trust_remote_code: bool
    zero_stage: int
    tokens_per_batch: int | None
    token_logps: bool
    spool: str
    order: str
    longest: int | None
    units: list[Unit]

    @property
    def num_pairs(self) -> int:
        """Pairs to be scored."""
        return self.units[-1].stop if self.units else 0

    def write(self, path: Path) -> None:
        """Write the plan for the workers of this build."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def spool_order(self) -> npt.NDArray[np.int64]:
        """Spool indices in the order the units cut through, mapped into memory."""
        mapped: npt.NDArray[np.int64] = np.load(self.order, mmap_mode="r")
        return mapped

    @classmethod
    def read(cls, path: Path) -> ScoringPlan:
        """Read a plan that :meth:`write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["units"] = [Unit(**unit) for unit in fields["units"]]
        return cls(**fields)


def cut_units(waiting: SpooledPairs, *, num_workers: int) -> tuple[npt.NDArray[np.int64], list[Unit]]:
    """Order pairs by prompt hash and key, and cut the order into units of alike cost.

    Pairs of one prompt stay in one unit, so that the prompt, and an answer standing in several pairs, is scored
    once; a prompt with more pairs than two units hold goes on in the next one. Hash order mixes sources and lengths,
    which makes units alike and leaves the shards shuffled. Units shrink with the job, so that small builds share out
    evenly too, and are bounded, so that a kill costs little.

    Args:
        waiting: The pairs to be scored.
        num_workers: How many will share the units.

    Returns:
        The places of the pairs in that order, and the units as ranges of it.
    """
    unit_tokens = int(waiting.lengths.sum()) // (num_workers * UNITS_PER_WORKER)
    return cut_into(waiting, unit_tokens=min(max(unit_tokens, MIN_UNIT_TOKENS), MAX_UNIT_TOKENS))


def cut_into(pairs: SpooledPairs, *, unit_tokens: int) -> tuple[npt.NDArray[np.int64], list[Unit]]:
    """As :func:`cut_units`, into units of at least ``unit_tokens`` tokens but for the last."""
    order = np.lexsort((pairs.keys, pairs.prompt_hashes)).astype(np.int64)
    if len(order) == 0:
        return order, []
    ordered_hashes, ordered_lengths = pairs.prompt_hashes[order], pairs.lengths[order]
    units: list[Unit] = []
    start, tokens = 0, 0
    for place in range(len(order)):
        same_prompt = place > 0 and ordered_hashes[place] == ordered_hashes[place - 1]
        is_full = tokens >= (2 * unit_tokens if same_prompt else unit_tokens) or place - start == MAX_UNIT_PAIRS
        if is_full:
            units.append(Unit(start=start, stop=place))
            start, tokens = place, 0
        tokens += int(ordered_lengths[place])
    units.append(Unit(start=start, stop=len(order)))
    return order, units

"""The reference on one device: units drawn, scored, and each written as a shard.

Three threads: one reads pairs and lays out batches ahead, this one drives the device, one writes shards behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.example_key import example_key
from ...pipeline.cache.pair_spool import PairSpool
from ...pipeline.cache.scored_pair import ScoredPair
from ...pipeline.data.token_pair import TokenPair
from ...pipeline.scoring.batching import CPU_FILL_TOKENS, plan_batches
from ...pipeline.scoring.flops import ModelCost
from ...pipeline.scoring.layout_choice import choose_layout
from ...pipeline.scoring.layouts import empty_batch, scoring_batch
from ...pipeline.scoring.pair_scorer import PairScorer
from ...pipeline.scoring.scoring_batch import ScoringBatch, token_logps_of_sides
from ..building.build_plan import ScoringPlan
from ..building.left_out import unusable_pairs
from ..processes.background import ReadAhead, WriteBehind
from ..processes.heartbeat import process_name
from ..processes.job_store import StoreAddress
from .planned_reference import load_planned_reference
from .scoring_meter import ScoringMeter
from .token_budget import TokenBudget
from .unit_queue import UnitQueue

if TYPE_CHECKING:
    from .partitioned_scoring import PartitionedScoring


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LaidOutBatch:
    """A batch that waits for the device.

    Attributes:
        unit: The unit it belongs to.
        places: Its pairs' places in the unit.
        pairs: The pairs.
        tensors: The same, laid out.
        ends_unit: Whether it is the unit's last.
    """

    unit: int
    places: Sequence[int]
    pairs: Sequence[TokenPair]
    tensors: ScoringBatch
    ends_unit: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairValues:
    """What the reference says of a pair.

    Attributes:
        sums: Chosen, rejected, and the same over the common tokens.
        token_logps: Of each scored token, chosen and rejected; None where they are not kept.
    """

    sums: Sequence[float]
    token_logps: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None


ScoredUnit = dict[int, tuple[TokenPair, PairValues]]
"""What has been scored of a unit: each pair and its values, by the pair's place in the unit."""


class ScoringWorker:
    """The reference on one device, and where its results go.

    Args:
        plan: What is to be scored, with which model.
        address: The build's store; each thread has a connection of its own.
        device: Where to score.
        partitioned: Where the model is spread over all ranks, which then have to run their passes together.
    """

    def __init__(
        self,
        plan: ScoringPlan,
        address: StoreAddress,
        device: torch.device,
        partitioned: PartitionedScoring | None = None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._partitioned = partitioned
        self._cache = ReferenceCache.open(Path(plan.cache))
        self._spool = PairSpool(Path(plan.spool))
        self._order = plan.spool_order()
        self._drawing, self._counting, self._finishing = (
            UnitQueue(address.connect(), len(plan.units)) for _ in range(3)
        )
        self._fill_tokens = CPU_FILL_TOKENS if device.type == "cpu" else None
        self._scorer: nn.Module = load_planned_reference(plan, device) if partitioned is None else partitioned.engine
        pair_scorer = self._scorer if partitioned is None else partitioned.engine.module
        assert isinstance(pair_scorer, PairScorer)
        self._budget = TokenBudget(plan.tokens_per_batch, device=device, model=pair_scorer.model)
        self._meter = ScoringMeter(self._counting, device=device, cost=ModelCost.of_model(pair_scorer.model))
        # The longest pair goes first, with the proof of the layout: too little memory shows in the first minute.
        assert plan.longest is not None, "no process is started where there is nothing to score"
        self._layout = choose_layout(self._scorer, device=device, pairs=self._spool.read([plan.longest]))

    def run(self) -> None:
        """Score until the build has no unit left."""
        unit: ScoredUnit = {}
        stop = self._drawing.stop
        with WriteBehind(on_fault=stop) as writer, ReadAhead(self._laid_out(), on_stop=stop) as waiting:
            turn_started = time.monotonic()
            for batch in waiting if self._partitioned is None else self._partitioned.in_step(waiting):
                if batch is None:  # the other ranks still have work
                    self._forward(empty_batch(self._layout))
                    continue
                forward_started = time.monotonic()
                unit |= self._score(batch.places, batch.pairs, batch.tensors)
                forward_s = time.monotonic() - forward_started
                if batch.ends_unit:
                    recorded = {
                        "layout": str(self._layout),
                        "device": self._device.type,
                        "tokens_per_batch": self._budget.tokens,
                    }
                    writer.submit(partial(self._write, batch.unit, unit, recorded=recorded))
                    unit = {}
                turn_s = time.monotonic() - turn_started
                self._meter.add(batch.tensors, forward_s=forward_s, turn_s=turn_s)
                turn_started += turn_s

    def _laid_out(self) -> Iterator[LaidOutBatch]:
        """Batches of one unit after another, made in the reading thread."""
        for number in self._drawing.units(process_name(os.getpid()), take_over=self._partitioned is None):
            unit = self._plan.units[number]
            pairs = self._spool.read(self._order[unit.start : unit.stop].tolist())
            batches = self._split(pairs)
            for index, places in enumerate(batches):
                members = [pairs[place] for place in places]
                tensors = scoring_batch(members, self._layout)
                yield LaidOutBatch(
                    unit=number,
                    places=places,
                    pairs=members,
                    tensors=tensors.pin_memory() if self._device.type == "cuda" else tensors,
                    ends_unit=index == len(batches) - 1,
                )

    def _split(self, pairs: Sequence[TokenPair]) -> list[list[int]]:
        return plan_batches(pairs, self._layout, tokens_per_batch=self._budget.tokens, fill_tokens=self._fill_tokens)

    def _score(self, places: Sequence[int], pairs: Sequence[TokenPair], tensors: ScoringBatch) -> ScoredUnit:
        """Score a batch; where memory runs out, in parts."""
        try:
            values = self._forward(tensors)
        except torch.OutOfMemoryError:
            if self._partitioned is not None:
                raise  # the other ranks are in the middle of the same pass
        else:
            self._counting.add("forwards", 1)
            self._counting.add("pairs", len(pairs))
            self._counting.add("tokens", sum(pair.shared_prefix_tokens for pair in pairs))
            return dict(zip(places, zip(pairs, values, strict=True), strict=True))
        # Only now: the handler keeps the tensors of the failed pass alive.
        # Without padding, as batches are planned: half of it is less than these pairs take, so that they are split.
        self._budget.shrink(failed_tokens=tensors.num_tokens, num_pairs=len(pairs))
        scored: ScoredUnit = {}
        for members in self._split(pairs):
            part = [pairs[member] for member in members]
            scored |= self._score([places[member] for member in members], part, scoring_batch(part, self._layout))
        return scored

    @torch.inference_mode()
    def _forward(self, tensors: ScoringBatch) -> list[PairValues]:
        """The values of each pair, on the host: the device is done when it returns."""
        tensors = tensors.to(self._device, non_blocking=True)
        logps = self._scorer(tensors)
        sums = logps.stacked_sums.tolist()
        if not self._plan.token_logps:
            return [PairValues(sums=sums_of_pair, token_logps=None) for sums_of_pair in sums]
        sides = [side.float().cpu().numpy() for side in token_logps_of_sides(logps.token_logps_N, tensors)]
        chosen, rejected = sides[: tensors.num_pairs], sides[tensors.num_pairs :]
        return [
            PairValues(sums=sums_of_pair, token_logps=(of_chosen, of_rejected))
            for sums_of_pair, of_chosen, of_rejected in zip(sums, chosen, rejected, strict=True)
        ]

    def _write(self, number: int, unit: ScoredUnit, *, recorded: dict[str, Any]) -> None:
        """Write a unit's shard, in the writing thread; pairs whose values are refused are reported instead."""
        rows = [_scored_pair(*unit[place]) for place in sorted(unit)]
        unusable = unusable_pairs(rows)
        self._finishing.report_unusable(unusable)
        refused = {pair.key for pair in unusable}
        usable = [row for row in rows if row.key.hex() not in refused]
        shard = ""
        if usable:
            shard = self._cache.shards.write(usable, recorded=recorded).file_name
        self._finishing.finish(number, shard)


def _scored_pair(pair: TokenPair, values: PairValues) -> ScoredPair:
    chosen, rejected, chosen_common, rejected_common = values.sums
    chosen_token_logps, rejected_token_logps = values.token_logps or (None, None)
    return ScoredPair(
        key=example_key(pair),
        pair=pair,
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
        ref_chosen_common_logps=chosen_common,
        ref_rejected_common_logps=rejected_common,
        chosen_tokens=pair.chosen_tokens,
        rejected_tokens=pair.rejected_tokens,
        chosen_token_logps=chosen_token_logps,
        rejected_token_logps=rejected_token_logps,
    )

"""Take over reference values that another trainer computed, as rows of a cache; nothing is scored but a sample.

Shapes: S pairs of a sample, W pairs that wait for values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.example_key import Keys, example_key, name_keys
from ..pipeline.cache.mixture_rows import MixtureRows
from ..pipeline.cache.pair_spool import PairSpool
from ..pipeline.cache.scored_pair import ScoredPair
from ..pipeline.data.token_pair import TokenPair
from .building.build_cache import damaged_shards, description_of, open_cache, scratch_folder
from .building.build_datasets import SPOOL, collect_datasets, open_datasets
from .building.build_plan import cut_units
from .building.build_reference import BuildReference, resolve_reference
from .building.mixture_change import mixture_content
from .building.pair_collection import SpooledPairs
from .console.library_output import quiet_libraries
from .console.progress import Progress
from .interchange.import_config import ImportConfig
from .interchange.import_proof import prove_values
from .interchange.import_report import ImportReport
from .interchange.value_matching import matched_values, with_keys
from .interchange.value_source import SourceValues, read_source


def import_values(source_path: Path, config: ImportConfig) -> ImportReport:
    """Match a source's values to the pairs of datasets, check a sample, and write them as a build would have.

    Args:
        source_path: What :func:`~.value_source.read_source` reads.
        config: The datasets, the reference and the cache.

    Raises:
        DpoCacheError: The source cannot be read, does not fit the datasets, or does not hold what the reference
            gives; or it lacks some pairs, and then those it has stay imported, and a build scores just the others.
    """
    quiet_libraries()
    source = read_source(source_path)
    reference = resolve_reference(config)
    _refuse_other_reference(source_path, source, reference)
    ReferenceCache.planned(config.cache, description_of(reference))  # another's is refused first
    datasets = open_datasets(config)  # before there is a folder: a mistyped name leaves none behind
    cache = open_cache(config, reference, recorded={**reference.names(), "begun_with": source.recorded})
    with cache.building(config.mixture), scratch_folder(cache.path / "tmp") as scratch:
        damaged = damaged_shards(cache)
        known = cache.shards.key_index(without=damaged)
        collected = collect_datasets(config, reference, datasets, known=known, scratch=scratch)
        content = mixture_content(cache, config, collected.content, known=known)
        if source.keys is None:
            source = with_keys(source_path, source, collected.content.rows, datasets)
        waiting = _WaitingValues(
            PairSpool(scratch / SPOOL),
            collected.waiting,
            matched_values(source_path, source, collected.waiting.keys),
            _longest_sequences(collected.content.rows, collected.waiting.keys),
            are_averages=config.values == "averages",
        )
        spread = None
        if config.rescore and len(waiting.found):
            spread = prove_values(source_path, *waiting.sample(config.rescore), config, reference)
        waiting.write(cache, recorded={"imported": {**source.recorded, "values": config.values}})
        waiting.refuse_missing(source_path, config)
        if content.is_new or damaged:
            content.write(cache, config.mixture, key_index=cache.shards.key_index(without=damaged))
    return ImportReport(
        cache=str(config.cache),
        mixture=config.mixture,
        source=source.recorded,
        training_pairs=len(content.rows),
        pairs_imported=len(waiting.found),
        pairs_reused=collected.num_reused,
        dropped=collected.content.dropped,
        truncated=collected.truncated,
        rescored=spread,
    )


def _refuse_other_reference(path: Path, source: SourceValues, reference: BuildReference) -> None:
    identity = reference.identity
    if source.reference_id not in (None, identity.digest):
        raise DpoCacheError(
            f"{path} says that its values are of the reference {str(source.reference_id)[:16]}…, and --model with "
            f"{identity.precision} and attention {identity.attention} is {identity.digest[:16]}…",
            next_step="name the model, --dtype, --quantization and --attn-implementation of the cache that it was "
            "exported from",
        )


class _WaitingValues:
    """The pairs that the cache does not hold, with the values that the source has for them.

    Args:
        spool: Holds their tokens.
        waiting: Their keys, and where their tokens lie.
        values_W2: Chosen and rejected as the source has them; NaN where it lacks the pair.
        longest_W: Tokens of each pair's prompt with its longer answer.
        are_averages: Whether they are averages per scored token.
    """

    def __init__(
        self,
        spool: PairSpool,
        waiting: SpooledPairs,
        values_W2: npt.NDArray[np.float64],
        longest_W: npt.NDArray[np.int32],
        *,
        are_averages: bool,
    ) -> None:
        self._spool = spool
        self._waiting = waiting
        self._values_W2 = values_W2
        self._longest_W = longest_W
        self._are_averages = are_averages
        self.found = np.flatnonzero(~np.isnan(values_W2).any(axis=1))

    def sample(self, size: int) -> tuple[list[TokenPair], npt.NDArray[np.float64]]:
        """Pairs that have values, drawn by a fixed seed, and the values as the source has them, shape (S, 2).

        The longest is always among them: if the source's sequences were cut off, its values are over fewer tokens.
        """
        longest = self.found[np.argmax(self._longest_W[self.found])]
        others = np.random.RandomState(0).permutation(self.found[self.found != longest])
        places = np.concatenate([[longest], others])[:size]
        return self._tokens(places), self._values_W2[places]

    def write(self, cache: ReferenceCache, *, recorded: dict[str, Any]) -> None:
        """Write the pairs that have values in units, as a build would."""
        order, units = cut_units(self._waiting.take(self.found), num_workers=1)
        with Progress(len(order), unit="pair", title="import") as progress:
            for unit in units:
                places = self.found[order[unit.start : unit.stop]]
                pairs = self._tokens(places)
                rows = [self._row(pair, place) for pair, place in zip(pairs, places, strict=True)]
                cache.shards.write(rows, recorded=recorded)
                progress.reach(unit.stop)

    def refuse_missing(self, path: Path, config: ImportConfig) -> None:
        """Refuse to go on where the source lacks pairs."""
        missing = self._waiting.keys[np.isnan(self._values_W2).any(axis=1)]
        if len(missing):
            raise DpoCacheError(
                f"{path} has values for {len(self.found)} of {len(self._waiting)} pairs, which are imported, and none "
                f"for {len(missing)}: {name_keys(missing)}",
                next_step=f"dpo-cache build --cache {as_argument(config.cache)} --mixture {config.mixture} … with the "
                "same options scores just these",
            )

    def _tokens(self, places: npt.NDArray[np.int64]) -> list[TokenPair]:
        return self._spool.read(self._waiting.spool_indices[places].tolist())

    def _row(self, pair: TokenPair, place: int) -> ScoredPair:
        tokens = (pair.chosen_tokens, pair.rejected_tokens)
        chosen, rejected = (
            float(value) * (count if self._are_averages else 1)
            for value, count in zip(self._values_W2[place], tokens, strict=True)
        )
        common = min(tokens)
        return ScoredPair(
            key=example_key(pair),
            pair=pair,
            ref_chosen_logps=chosen,
            ref_rejected_logps=rejected,
            # Of the shorter answer it is the whole sum; of the longer one nobody knows it.
            ref_chosen_common_logps=chosen if tokens[0] == common else np.nan,
            ref_rejected_common_logps=rejected if tokens[1] == common else np.nan,
            chosen_tokens=tokens[0],
            rejected_tokens=tokens[1],
        )


def _longest_sequences(rows: MixtureRows, keys: Keys) -> npt.NDArray[np.int32]:
    """Tokens of the prompt with the longer answer of the pairs with these keys, which are among the rows."""
    distinct, first = np.unique(rows.example_keys, return_index=True)
    places = first[np.searchsorted(distinct, keys)]
    answers = np.maximum(rows.chosen_lengths[places], rows.rejected_lengths[places])
    longest: npt.NDArray[np.int32] = rows.prompt_lengths[places] + answers
    return longest

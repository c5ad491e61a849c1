"""Drop rows that stand in several shards: builds that ran at once may have scored the same pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.durable_file import remove_durably
from ..pipeline.cache.key_index import KeyIndex
from ..pipeline.cache.scored_pair import ScoredPair
from ..pipeline.cache.shard_file import iterate_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What was dropped.

    Attributes:
        cache: The cache.
        dropped_rows: Rows that another shard holds too.
        shards_before: Shards there were.
        shards_after: Shards there are.
        rewritten_mixtures: Mixtures whose rows have moved; their training sets are the same.
    """

    cache: str
    dropped_rows: int
    shards_before: int
    shards_after: int
    rewritten_mixtures: list[str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        if not self.dropped_rows:
            return "nothing to drop: every pair stands in one shard"
        return f"dropped {self.dropped_rows:,} rows; {self.shards_before} shards became {self.shards_after}"


def compact(path: Path) -> CompactReport:
    """Keep one row of each pair.

    At every moment each mixture's pointer names rows that are there: first come shards with what is kept of the old
    ones, then the mixtures over to them, then the old shards go.

    Args:
        path: The cache.

    Raises:
        DpoCacheError: There is no cache, a build or a training is running, or something in the cache is damaged.
    """
    cache = ReferenceCache.open(path)
    with cache.maintaining("compacting"):
        survey = cache.shards.survey()
        if survey.unusable:
            raise DpoCacheError(
                f"{len(survey.unusable)} shards of {path} cannot be used, the first: {survey.unusable[0].reason}",
                next_step=f"dpo-cache verify {path} --repair",
            )
        index = cache.shards.key_index()
        outdated = _rewrite_shards(cache, index)
        moved = _move_mixtures(cache, outdated)
        for shard in outdated:
            remove_durably(shard)
        return CompactReport(
            cache=str(path),
            dropped_rows=index.num_duplicates,
            shards_before=len(index.shards),
            shards_after=len(cache.shards.paths()),
            rewritten_mixtures=moved,
        )


def _rewrite_shards(cache: ReferenceCache, index: KeyIndex) -> list[Path]:
    """Write anew what is kept of the shards that lose rows, and return these."""
    outdated = []
    for number, shard in enumerate(index.shards):
        kept_rows = index.rows[index.shard_numbers == number]
        if len(kept_rows) == shard.num_rows:
            continue
        path = cache.shards.path_of(shard)
        is_kept = np.zeros(shard.num_rows, dtype=np.bool_)
        is_kept[kept_rows] = True
        kept: list[ScoredPair] = [row for row, keep in zip(iterate_shard(path), is_kept, strict=True) if keep]
        if kept:
            with cache.shards.open(path) as reader:
                cache.shards.write(kept, recorded=reader.recorded)
        outdated.append(path)
    return outdated


def _move_mixtures(cache: ReferenceCache, outdated: list[Path]) -> list[str]:
    """Let mixtures that name an outdated shard name the others instead."""
    gone = {path.name for path in outdated}
    index = cache.shards.index_of(path for path in cache.shards.paths() if path not in outdated)
    moved = []
    for name in cache.mixture_names():
        mixture = cache.read_mixture(name)
        if gone.isdisjoint(shard.file_name for shard in mixture.shards):
            continue
        cache.write_mixture(
            name,
            mixture.rows(),
            key_index=index,
            tokenization=mixture.tokenization,
            sources=mixture.sources,
            dropped=mixture.dropped,
        )
        moved.append(name)
    return moved

"""The pairs that datasets came to: those to train on, and those of them that wait to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pipeline.cache.example_key import Keys
from ...pipeline.cache.mixture_rows import MixtureRows
from .left_out import KeysByReason, without_pairs
from .row_counts import dropped_rows, truncated_rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpooledPairs:
    """Pairs that wait to be scored, in spool order. Shapes: (pairs,).

    Attributes:
        spool_indices: Where in the spool their tokens lie.
        keys: Their keys.
        prompt_hashes: What puts pairs of one prompt side by side.
        lengths: Tokens each costs when its prompt is computed once.
    """

    spool_indices: npt.NDArray[np.int64]
    keys: Keys
    prompt_hashes: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, places: npt.NDArray[np.int64]) -> SpooledPairs:
        """The pairs at these places, in that order."""
        return SpooledPairs(**{column.name: getattr(self, column.name)[places] for column in fields(self)})

    def distinct(self) -> SpooledPairs:
        """Each pair once, where it stands first."""
        _, first = np.unique(self.keys, return_index=True)
        return self if len(first) == len(self) else self.take(np.sort(first))

    @staticmethod
    def concatenate(parts: Sequence[SpooledPairs]) -> SpooledPairs:
        """All parts, at least one, one after another."""
        return SpooledPairs(
            **{
                column.name: np.concatenate([getattr(part, column.name) for part in parts])
                for column in fields(SpooledPairs)
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CollectedPairs:
    """What the datasets of a build came to.

    Attributes:
        rows: All training pairs, repeats included.
        waiting: The distinct pairs that the cache does not hold; their tokens lie in the spool.
        num_distinct: Distinct pairs among ``rows``.
        num_source_rows: Distinct rows read from the sources.
        sources: What each source was and what of it is not used, for the mixture's record.
        tokenization: How the tokens were made, for the mixture's record.
    """

    rows: MixtureRows
    waiting: SpooledPairs
    num_distinct: int
    num_source_rows: int
    sources: list[dict[str, Any]]
    tokenization: dict[str, Any]

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that are not used, by reason."""
        return dropped_rows(self.sources)

    @property
    def truncated(self) -> dict[str, int]:
        """Rows of which something was cut, by part."""
        return truncated_rows(self.sources)

    @property
    def num_usable_rows(self) -> int:
        """Distinct rows that make pairs."""
        return self.num_source_rows - sum(self.dropped.values())

    @property
    def num_reused(self) -> int:
        """Distinct pairs that the cache holds already."""
        return self.num_distinct - len(self.waiting)

    def without(self, keys: KeysByReason) -> CollectedPairs:
        """The same without the pairs of these keys, which are recorded and counted as dropped."""
        if not keys:
            return self
        rows, sources = without_pairs(self.rows, self.sources, keys)
        stays = np.isin(self.waiting.keys, rows.example_keys)
        return replace(
            self,
            rows=rows,
            sources=sources,
            waiting=self.waiting.take(np.flatnonzero(stays)),
            num_distinct=len(np.unique(rows.example_keys)),
        )

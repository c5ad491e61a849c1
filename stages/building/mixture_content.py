"""What a mixture is to hold, before it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.key_index import KeyIndex
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.mixture_rows import MixtureRows
from .left_out import KeysByReason, without_pairs
from .row_counts import dropped_rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureContent:
    """What a mixture is to hold.

    Attributes:
        rows: Its training pairs, repeats included.
        tokenization: How their tokens were made.
        sources: The records of their datasets, each with what of it is not used.
        is_new: Whether the cache has to be told: it has no whole mixture of this name that says just this.
        already_there: Of the rows that were to be added to a mixture, those that it had.
        repeated: Of the rows that are added, those whose pair the mixture had from another row.
    """

    rows: MixtureRows
    tokenization: dict[str, Any]
    sources: list[dict[str, Any]]
    is_new: bool
    already_there: int = 0
    repeated: int = 0

    @classmethod
    def of(cls, mixture: Mixture) -> MixtureContent:
        """What a mixture of a cache holds."""
        return cls(rows=mixture.rows(), tokenization=mixture.tokenization, sources=mixture.sources, is_new=False)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows of the datasets that are not used, by reason."""
        return dropped_rows(self.sources)

    def without(self, keys: KeysByReason) -> MixtureContent:
        """The same without the pairs of these keys, which are recorded and counted as dropped."""
        if not keys:
            return self
        rows, sources = without_pairs(self.rows, self.sources, keys)
        return replace(self, rows=rows, sources=sources)

    def write(self, cache: ReferenceCache, name: str, *, key_index: KeyIndex) -> None:
        """Give the cache a mixture of this name and content.

        Args:
            cache: The cache, which has all its rows by now.
            name: The mixture's.
            key_index: Where the rows are to be found.
        """
        cache.write_mixture(
            name,
            self.rows,
            key_index=key_index,
            tokenization=self.tokenization,
            sources=self.sources,
            dropped=self.dropped,
        )

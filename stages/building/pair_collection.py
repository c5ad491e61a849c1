"""The pairs that datasets came to: those to train on, and those of them that wait to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from ...pipeline.cache.example_key import Keys
from .left_out import KeysByReason
from .mixture_content import MixtureContent
from .row_counts import truncated_rows


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
        content: A new mixture of all of them.
        waiting: The distinct pairs that the cache does not hold; their tokens lie in the spool.
        num_distinct: Distinct pairs of the mixture.
        num_source_rows: Distinct rows read from the sources.
    """

    content: MixtureContent
    waiting: SpooledPairs
    num_distinct: int
    num_source_rows: int

    @property
    def truncated(self) -> dict[str, int]:
        """Rows of which something was cut, by part."""
        return truncated_rows(self.content.sources)

    @property
    def num_usable_rows(self) -> int:
        """Distinct rows that make pairs."""
        return self.num_source_rows - sum(self.content.dropped.values())

    @property
    def num_reused(self) -> int:
        """Distinct pairs that the cache holds already."""
        return self.num_distinct - len(self.waiting)

    def without(self, keys: KeysByReason) -> CollectedPairs:
        """The same without the pairs of these keys, which are recorded and counted as dropped."""
        if not keys:
            return self
        content = self.content.without(keys)
        stays = np.isin(self.waiting.keys, content.rows.example_keys)
        return replace(
            self,
            content=content,
            waiting=self.waiting.take(np.flatnonzero(stays)),
            num_distinct=len(np.unique(content.rows.example_keys)),
        )

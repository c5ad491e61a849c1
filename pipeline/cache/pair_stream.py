"""Reading scored pairs by their place in a mixture, with memory that does not grow with the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError, as_argument
from .example_key import key_at
from .mixture import Mixture
from .mixture_table import MixtureBlock
from .row_reader import CACHED_BYTES, RecentlyUsed, RowReader
from .scored_pair import ScoredPair

if TYPE_CHECKING:
    from .cache_folder import ReferenceCache


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where one requested row lies, and what the mixture says of it."""

    position: int
    key: bytes
    shard: int
    row: int
    length: int


class PairStream:
    """Reads rows of a mixture; for one thread.

    What is read is checked as :class:`~.row_reader.RowReader` does. Rows asked for together should lie near each
    other in the mixture, as :func:`~.pair_order.epoch_order` makes them: then each row group is decoded about once.

    Args:
        cache: The cache.
        mixture: A mixture of it.
        cached_bytes: Bound on decoded rows kept for later reads.
    """

    def __init__(self, cache: ReferenceCache, mixture: Mixture, *, cached_bytes: int = CACHED_BYTES) -> None:
        self._cache = cache
        self._mixture = mixture
        self._blocks: RecentlyUsed[int, MixtureBlock] = RecentlyUsed(max(1, cached_bytes // 8))
        self._rows = RowReader(cache, mixture.shards, cached_bytes=cached_bytes)

    def __len__(self) -> int:
        return self._mixture.num_pairs

    def read(self, mixture_rows: npt.NDArray[np.signedinteger[Any]]) -> list[ScoredPair]:
        """The pairs in these rows of the mixture, in this order. Ids are views that must not be written to.

        Raises:
            DpoCacheError: A shard is missing or damaged, or a row is not the pair the mixture means.
        """
        pairs: list[ScoredPair | None] = [None] * len(mixture_rows)
        # By shard and row, so that no row group is decoded twice however small the cache of them is.
        for place in sorted(self._places(mixture_rows), key=lambda place: (place.shard, place.row)):
            pairs[place.position] = self._pair(place)
        return [pair for pair in pairs if pair is not None]

    def close(self) -> None:
        """Close all files."""
        self._rows.close()

    def _places(self, mixture_rows: npt.NDArray[np.signedinteger[Any]]) -> list[_Place]:
        assert len(mixture_rows) == 0 or 0 <= mixture_rows.min() <= mixture_rows.max() < len(self)
        blocks, offsets = np.divmod(mixture_rows, self._mixture.block_rows)
        places = []
        for position in np.argsort(blocks, kind="stable"):
            block, offset = self._block(int(blocks[position])), int(offsets[position])
            places.append(
                _Place(
                    position=int(position),
                    key=key_at(block.keys, offset),
                    shard=int(block.shards[offset]),
                    row=int(block.rows[offset]),
                    length=int(block.lengths[offset]),
                )
            )
        return places

    def _pair(self, place: _Place) -> ScoredPair:
        if not 0 <= place.shard < len(self._mixture.shards):
            raise DpoCacheError(f"mixture {self._mixture.name} names a shard that it does not list")
        if not 0 <= place.row < self._rows.num_rows(place.shard):
            raise self._wrong_place(place)
        pair = self._rows.pair(place.shard, place.row)
        if pair.key != place.key or pair.pair.shared_prefix_tokens != place.length:
            raise self._wrong_place(place)
        return pair

    def _block(self, number: int) -> MixtureBlock:
        block = self._blocks.get(number)
        if block is None:
            block = self._mixture.table.block(number)
            self._blocks.put(number, block)
        return block

    def _wrong_place(self, place: _Place) -> DpoCacheError:
        return DpoCacheError(
            f"mixture {self._mixture.name} expects the pair {place.key.hex()} in row {place.row} of shard "
            f"{self._mixture.shards[place.shard].sha256[:16]}…, which holds another",
            next_step=f"find all damage with: dpo-cache verify {as_argument(self._cache.path)}",
        )

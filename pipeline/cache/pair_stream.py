"""Reading scored pairs by their place in a mixture, with memory that does not grow with the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .cache_folder import ReferenceCache
from .example_key import key_at
from .mixture import Mixture, MixtureBlock
from .shard_file import RowGroup, ScoredPair, ShardReader, check_key, verify_shard

CACHED_BYTES = 256 << 20
"""Decoded row groups kept: a window of the epoch order of pairs of about 4,000 tokens."""
MAX_OPEN_SHARDS = 64


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=_Sized)


class _RecentlyUsed(Generic[K, V]):
    """Values by key, dropping those unused for longest once together they exceed a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        self._values[key] = value
        self._bytes += value.num_bytes
        while self._bytes > self._max_bytes and len(self._values) > 1:
            _, dropped = self._values.popitem(last=False)
            self._bytes -= dropped.num_bytes


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

    Before the first row of a shard is handed out, the whole file's SHA-256 is held against its name; every
    row's key is recomputed from its token ids. Rows asked for together should lie near each other in the
    mixture, as :func:`~.pair_order.epoch_order` makes them: then each row group is decoded about once.

    Args:
        cache: The cache.
        mixture: A mixture of it.
        cached_bytes: Bound on decoded rows kept for later reads.
    """

    def __init__(self, cache: ReferenceCache, mixture: Mixture, *, cached_bytes: int = CACHED_BYTES) -> None:
        self._cache = cache
        self._mixture = mixture
        self._blocks: _RecentlyUsed[int, MixtureBlock] = _RecentlyUsed(max(1, cached_bytes // 8))
        self._row_groups: _RecentlyUsed[tuple[int, int], RowGroup] = _RecentlyUsed(cached_bytes)
        self._open_shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self._mixture.num_pairs

    def read(self, mixture_rows: npt.NDArray[np.int64]) -> list[ScoredPair]:
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
        while self._open_shards:
            self._open_shards.popitem()[1].close()

    def _places(self, mixture_rows: npt.NDArray[np.int64]) -> list[_Place]:
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
        shard = self._shard(place.shard)
        if not 0 <= place.row < shard.num_rows:
            raise self._wrong_place(place)
        group = int(shard.row_group_of(np.array([place.row]))[0])
        rows = self._row_groups.get((place.shard, group))
        if rows is None:
            rows = shard.read_row_group(group)
            self._row_groups.put((place.shard, group), rows)
        pair = rows.scored_pair(place.row - rows.first_row)
        check_key(pair, shard.path)
        if pair.key != place.key or pair.pair.shared_prefix_tokens != place.length:
            raise self._wrong_place(place)
        return pair

    def _block(self, number: int) -> MixtureBlock:
        block = self._blocks.get(number)
        if block is None:
            block = self._mixture.table.block(number)
            self._blocks.put(number, block)
        return block

    def _shard(self, number: int) -> ShardReader:
        shard = self._open_shards.get(number)
        if shard is None:
            shard = self._cache.open_shard(self._verified_path(number))
            self._open_shards[number] = shard
            if len(self._open_shards) > MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)[1].close()
        self._open_shards.move_to_end(number)
        return shard

    def _verified_path(self, number: int) -> Path:
        if not 0 <= number < len(self._mixture.shards):
            raise DpoCacheError(f"mixture {self._mixture.name} names a shard that it does not list")
        path = self._cache.path / "shards" / self._mixture.shards[number].file_name
        if number not in self._verified:
            verify_shard(path)
            self._verified.add(number)
        return path

    def _wrong_place(self, place: _Place) -> DpoCacheError:
        return DpoCacheError(
            f"mixture {self._mixture.name} expects the pair {place.key.hex()} in row {place.row} of shard "
            f"{self._mixture.shards[place.shard].sha256[:16]}…, which holds another",
            next_step=f"find all damage with: dpo-cache verify {self._cache.path}",
        )

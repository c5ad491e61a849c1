"""Rows of shards by number, with memory that does not grow with the cache."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from .row_group import RowGroup
from .scored_pair import ScoredPair
from .shard_file import ShardReader, ShardRef, check_key, verify_shard

if TYPE_CHECKING:
    from .cache_folder import ReferenceCache

CACHED_BYTES = 256 << 20
"""Decoded row groups kept: a window of the epoch order of pairs of about 4,000 tokens."""
MAX_IDLE_READS = 16_384
"""Pairs of a window of the epoch order: what none of as many reads needed will not be needed soon."""
MAX_OPEN_SHARDS = 1024
"""And no more than a quarter of the files that this process may have open. Where many builds have added to a mixture,
the order of an epoch goes through the shards of all of them all the time."""
MAX_OPEN_ROW_GROUPS = 8192
"""Of all open shards together: each takes some 13 KiB of memory."""


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=_Sized)


class RecentlyUsed(Generic[K, V]):
    """Values by key. Those unused for longest are dropped: idle ones, and once together they exceed a number of bytes.

    Args:
        max_bytes: Bound on all values together, unless there is only one.
        max_idle: A value is idle once as many other look-ups have gone by.
    """

    def __init__(self, max_bytes: int, *, max_idle: int = MAX_IDLE_READS) -> None:
        self._max_bytes = max_bytes
        self._max_idle = max_idle
        self._bytes = 0
        self._lookups = 0
        self._values: OrderedDict[K, V] = OrderedDict()
        self._last_use: dict[K, int] = {}

    def get(self, key: K) -> V | None:
        """The value, from now on the one used last; None where it is not there."""
        self._lookups += 1
        if key in self._values:
            self._values.move_to_end(key)
            self._last_use[key] = self._lookups
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value that is not there yet, and drop what has to make room."""
        self._values[key] = value
        self._last_use[key] = self._lookups
        self._bytes += value.num_bytes
        while len(self._values) > 1 and (self._bytes > self._max_bytes or self._is_oldest_idle()):
            oldest, dropped = self._values.popitem(last=False)
            self._bytes -= dropped.num_bytes
            del self._last_use[oldest]

    def _is_oldest_idle(self) -> bool:
        oldest = next(iter(self._values))
        return self._lookups - self._last_use[oldest] > self._max_idle


class RowReader:
    """Reads rows of some shards of a cache; for one thread.

    Before the first row of a shard is handed out, the whole file's SHA-256 is held against its name; every row's key
    is recomputed from its token ids.

    Args:
        cache: The cache.
        shards: Its shards, in the order in which they are counted.
        cached_bytes: Bound on decoded rows kept for later reads.
    """

    def __init__(self, cache: ReferenceCache, shards: Sequence[ShardRef], *, cached_bytes: int = CACHED_BYTES) -> None:
        self._cache = cache
        self._shards = shards
        self._row_groups: RecentlyUsed[tuple[int, int], RowGroup] = RecentlyUsed(cached_bytes)
        self._open_shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._max_open = _max_open_shards()
        self._verified: set[int] = set()

    def num_rows(self, shard: int) -> int:
        """Rows of a shard."""
        return self._shard(shard).num_rows

    def pair(self, shard: int, row: int) -> ScoredPair:
        """A row of a shard. Its ids are views that must not be written to.

        Raises:
            DpoCacheError: The shard is missing or damaged, or the row's key is not that of its ids.
        """
        reader = self._shard(shard)
        group = int(reader.row_group_of(np.array([row]))[0])
        rows = self._row_groups.get((shard, group))
        if rows is None:
            rows = reader.read_row_group(group)
            self._row_groups.put((shard, group), rows)
        pair = rows.scored_pair(row - rows.first_row)
        check_key(pair, reader.path)
        return pair

    def close(self) -> None:
        """Close all files."""
        while self._open_shards:
            self._open_shards.popitem()[1].close()

    def _shard(self, number: int) -> ShardReader:
        shard = self._open_shards.get(number)
        if shard is None:
            shard = self._cache.shards.open(self._verified_path(number))
            self._open_shards[number] = shard
            self._close_oldest()
        self._open_shards.move_to_end(number)
        return shard

    def _close_oldest(self) -> None:
        while len(self._open_shards) > 1 and (
            len(self._open_shards) > self._max_open or self._open_row_groups() > MAX_OPEN_ROW_GROUPS
        ):
            self._open_shards.popitem(last=False)[1].close()

    def _open_row_groups(self) -> int:
        return sum(len(shard.group_starts) for shard in self._open_shards.values())

    def _verified_path(self, number: int) -> Path:
        assert 0 <= number < len(self._shards)
        path = self._cache.shards.path_of(self._shards[number])
        if number not in self._verified:
            verify_shard(path)
            self._verified.add(number)
        return path


def _max_open_shards() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if allowed == resource.RLIM_INFINITY else min(MAX_OPEN_SHARDS, max(1, allowed // 4))

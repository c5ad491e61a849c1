"""Finding a scored pair by its key, whichever shard it stands in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .example_key import KEY_BYTES, key_at
from .row_reader import RowReader
from .scored_pair import ScoredPair

if TYPE_CHECKING:
    from .cache_folder import ReferenceCache

KEY_LETTERS = 2 * KEY_BYTES
"""Digits of a key in hex."""


class PairLookup:
    """Looks pairs up by key; for one thread. 40 bytes a pair of the cache stay in memory.

    Args:
        cache: The cache, as it is now: shards that are written later are not seen.
    """

    def __init__(self, cache: ReferenceCache) -> None:
        self._index = cache.shards.key_index()
        self._rows = RowReader(cache, self._index.shards)

    def keys_beginning_with(self, digits: str) -> list[bytes]:
        """All keys that begin with these lower-case hexadecimal digits, ascending."""
        keys = self._index.keys
        first, last = (
            int(np.searchsorted(keys, np.bytes_(bytes.fromhex(digits.ljust(KEY_LETTERS, fill))))) for fill in "0f"
        )
        candidates = [key_at(keys, place) for place in range(first, min(last + 1, len(keys)))]
        return [key for key in candidates if key.hex().startswith(digits)]

    def find(self, key: bytes) -> ScoredPair | None:
        """The pair of this key; None where the cache has none.

        Raises:
            DpoCacheError: The shard that holds it is damaged.
        """
        place = int(self._index.find(np.array([key], dtype=self._index.keys.dtype))[0])
        if place < 0:
            return None
        return self._rows.pair(int(self._index.shard_numbers[place]), int(self._index.rows[place]))

    def close(self) -> None:
        """Close all files."""
        self._rows.close()

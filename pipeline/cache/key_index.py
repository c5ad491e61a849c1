"""Where each key of a cache stands, as three flat arrays: 40 bytes a pair."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .example_key import KEY_BYTES, Keys
from .shard_file import ShardRef


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeyIndex:
    """Sorted keys and their places. Shapes: K distinct keys.

    Attributes:
        keys: Ascending, shape (K,).
        shard_numbers: Position in ``shards`` of the shard that holds each key, shape (K,).
        rows: Row number in that shard, shape (K,).
        shards: The indexed shards, in the order in which they count: those with log-probabilities per token first,
            those with unknown values last, and by ascending digest.
        has_token_logps: Whether each of ``shards`` has log-probabilities per token, shape (shards,).
        num_duplicates: Rows that other shards hold too; the first counts.
    """

    keys: Keys
    shard_numbers: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    shards: Sequence[ShardRef]
    has_token_logps: npt.NDArray[np.bool_]
    num_duplicates: int

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The place of each key in :attr:`keys`, -1 where it is not there. Quickest for ascending keys."""
        return places_among(self.keys, keys)


def build_key_index(
    shards: Sequence[tuple[ShardRef, Keys]],
    *,
    with_token_logps: Collection[str] = (),
    with_unknown_values: Collection[str] = (),
) -> KeyIndex:
    """Index shards by key.

    Args:
        shards: Each with the keys of its rows in order. A key in several resolves to the one that says most, and among
            equals to the lowest digest.
        with_token_logps: Digests of the shards that have log-probabilities per token.
        with_unknown_values: Digests of the shards that have rows without sums over the common part.
    """
    order_of = {digest: -1 for digest in with_token_logps} | {digest: 1 for digest in with_unknown_values}
    shards = sorted(shards, key=lambda entry: (order_of.get(entry[0].sha256, 0), entry[0].sha256))
    lengths = [len(keys) for _, keys in shards]
    keys = np.concatenate([keys for _, keys in shards]) if shards else np.empty(0, dtype=f"S{KEY_BYTES}")
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), lengths)
    rows = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.empty(0, dtype=np.int32)])
    order = np.argsort(keys, kind="stable")  # stable: among equal keys the first shard stays first
    keys = keys[order]  # by hand: np.unique needs half as much memory again
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    order = order[first]
    return KeyIndex(
        keys=keys[first],
        shard_numbers=numbers[order],
        rows=rows[order],
        shards=[ref for ref, _ in shards],
        has_token_logps=np.array([ref.sha256 in with_token_logps for ref, _ in shards], dtype=np.bool_),
        num_duplicates=int(len(first) - first.sum()),
    )


def places_among(ascending: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The place of each wanted value among ascending ones, of equal ones the first; -1 where it is not there."""
    if not len(ascending):
        return np.full(len(wanted), -1, dtype=np.int64)
    places = np.searchsorted(ascending, wanted)
    places[places == len(ascending)] = 0
    places[ascending[places] != wanted] = -1
    return places

"""What must hold before anything is trained from a mixture, looked at in the whole of it.

Shapes: P training pairs of the mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .cache_folder import ReferenceCache
from .mixture import Mixture, name_keys, training_set_digest
from .parquet_file import KEY_COLUMN
from .shard_file import COMMON_COLUMNS, VALUE_COLUMNS, ShardReader, ShardRef, unusable_values, verify_shard

HASH_AT_ONCE_BYTES = 1 << 30
"""Up to here (a second or two) all shards are hashed at once; beyond, each before its first row is used."""


def check_mixture(cache: ReferenceCache, mixture: Mixture) -> None:
    """Check that a mixture is whole and every pair of it can be trained on, without decoding token ids.

    Looked at: the table's digest and order, that every row's shard is there with the size and rows the pointer
    states, that it holds the row's key at the row's place, and that every value is one a reference can give.

    Raises:
        DpoCacheError: With the number of pairs concerned and their first keys.
    """
    keys = mixture.table.column(KEY_COLUMN)
    shard_numbers, rows = mixture.table.column("shard"), mixture.table.column("row")
    _check_table(mixture, keys, shard_numbers)
    order = np.argsort(shard_numbers, kind="stable")
    hash_now = sum(shard.num_bytes for shard in mixture.shards) <= HASH_AT_ONCE_BYTES
    unusable = np.zeros(len(keys), dtype=np.bool_)
    for shard, path, places in _by_shard(cache, mixture, shard_numbers, order):
        wanted = keys[places]
        try:
            if hash_now:
                verify_shard(path)
            with _open_as_stated(cache, path, shard) as reader:
                unusable[places] = _unusable_rows(reader, path, wanted, rows[places])
        except DpoCacheError as error:
            raise DpoCacheError(
                f"mixture {mixture.name} lacks {len(places)} pairs ({name_keys(wanted)}): {error.found}",
                expected=error.expected,
                next_step=f"score them again with: dpo-cache verify --repair {cache.path}, then dpo-cache build",
            ) from error
    if unusable.any():
        raise DpoCacheError(
            f"{int(unusable.sum())} pairs of mixture {mixture.name} have reference values that are missing, not "
            f"finite or not below zero: {name_keys(keys[unusable])}",
            next_step=f"score them again with: dpo-cache verify --repair {cache.path}, then dpo-cache build",
        )


def check_common_values(cache: ReferenceCache, mixture: Mixture) -> None:
    """Check that the sums over the common part are known for all pairs of a mixture that :func:`check_mixture` passed.

    Raises:
        DpoCacheError: With the number of pairs whose sums are not.
    """
    shard_numbers, rows = mixture.table.column("shard"), mixture.table.column("row")
    unknown = 0
    for _, path, places in _by_shard(cache, mixture, shard_numbers, np.argsort(shard_numbers, kind="stable")):
        with cache.open_shard(path) as reader:
            values = np.stack([reader.numbers(name)[rows[places]] for name in COMMON_COLUMNS])
            unknown += int(np.isnan(values).any(axis=0).sum())
    if unknown:
        raise DpoCacheError(
            f"--ld-alpha needs the reference's sums up to the length of each pair's shorter answer, and "
            f"{unknown} pairs of mixture {mixture.name} were imported without them",
            expected="pairs that dpo-cache build scored",
            next_step="score them into a cache of their own (dpo-cache build --cache OTHER …), or leave --ld-alpha out",
        )


def _check_table(mixture: Mixture, keys: npt.NDArray[np.bytes_], shard_numbers: npt.NDArray[np.int32]) -> None:
    table = mixture.table
    if training_set_digest(keys) != mixture.digest:
        raise DpoCacheError(f"{table.path} is not the training set that the pointer {mixture.name}.json states")
    if not 0 <= shard_numbers.min() <= shard_numbers.max() < len(mixture.shards):
        raise DpoCacheError(f"{table.path} names a shard that the pointer {mixture.name}.json does not list")
    for name in ("prompt_length", "chosen_length", "rejected_length"):
        if table.column(name).min() < 1:
            raise DpoCacheError(f"{table.path} states a {name} below 1")


def _by_shard(
    cache: ReferenceCache,
    mixture: Mixture,
    shard_numbers: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
) -> Iterator[tuple[ShardRef, Path, npt.NDArray[np.int64]]]:
    """Each shard with the places of the mixture's rows that lie in it."""
    bounds = np.searchsorted(shard_numbers[order], np.arange(len(mixture.shards) + 1))
    for number, shard in enumerate(mixture.shards):
        places = order[bounds[number] : bounds[number + 1]]
        if len(places):
            yield shard, cache.path / "shards" / shard.file_name, places


def _open_as_stated(cache: ReferenceCache, path: Path, shard: ShardRef) -> ShardReader:
    reader = cache.open_shard(path)
    if (reader.num_rows, reader.num_bytes) != (shard.num_rows, shard.num_bytes):
        reader.close()
        raise DpoCacheError(
            f"{path} has {reader.num_rows} rows and {reader.num_bytes} bytes",
            expected=f"{shard.num_rows} rows and {shard.num_bytes} bytes",
        )
    return reader


def _unusable_rows(
    reader: ShardReader, path: Path, wanted: npt.NDArray[np.bytes_], rows: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    if not 0 <= rows.min() <= rows.max() < reader.num_rows:
        raise DpoCacheError(f"{path} has {reader.num_rows} rows; row {int(rows.max())} is asked for")
    elsewhere = reader.keys()[rows] != wanted
    if elsewhere.any():
        raise DpoCacheError(f"{path} holds other keys in {int(elsewhere.sum())} of these rows")
    values = {name: reader.numbers(name)[rows] for name in VALUE_COLUMNS}
    counts = np.minimum(reader.numbers("chosen_tokens")[rows], reader.numbers("rejected_tokens")[rows])
    unusable: npt.NDArray[np.bool_] = unusable_values(values) | (counts < 1)
    return unusable

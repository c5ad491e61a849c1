"""What must hold before anything is trained from a mixture, looked at in the whole of it.

Shapes: P training pairs of the mixture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError, as_argument
from .cache_folder import ReferenceCache
from .example_key import Keys, name_keys
from .mixture import Mixture
from .scored_pair import COMMON_COLUMNS, VALUE_COLUMNS, PairValues, unusable_in_words, unusable_values
from .shard_file import ShardReader, ShardRef, verify_shard
from .unreadable_file import UnreadableFileError

HASH_AT_ONCE_BYTES = 1 << 30
"""Up to here (a second or two) all shards are hashed at once; beyond, each before its first row is used."""
ROWS_AT_ONCE = 131_072


def check_mixture(cache: ReferenceCache, mixture: Mixture) -> None:
    """Check that a mixture is whole and every pair of it can be trained on, without decoding token ids.

    Looked at: the table's digest and order, that every row's shard is there with the size and rows the pointer
    states, that it holds the row's key at the row's place, and that every value is one a reference can give.

    Raises:
        DpoCacheError: With the number of pairs concerned and their first keys.
    """
    _check_table(mixture)
    hash_now = sum(shard.num_bytes for shard in mixture.shards) <= HASH_AT_ONCE_BYTES
    lacking: list[tuple[Keys, DpoCacheError]] = []
    unscored: list[Keys] = []
    unusable: list[tuple[Keys, PairValues]] = []
    remedy = f"score them again with: dpo-cache verify --repair {as_argument(cache.path)}, then dpo-cache build"
    for shard, path, wanted, rows in _by_shard(cache, mixture):
        try:
            if hash_now:
                verify_shard(path)
            with _open_as_stated(cache, mixture, path, shard) as reader:
                values, tokens = _values_and_tokens(reader, path, wanted, rows)
            unscored.append(wanted[tokens < 1])
            is_bad = unusable_values(values)
            unusable.append((wanted[is_bad], {name: column[is_bad] for name, column in values.items()}))
        except UnreadableFileError:
            raise
        except DpoCacheError as error:
            lacking.append((wanted, error))
    if lacking:
        keys, first = np.concatenate([wanted for wanted, _ in lacking]), lacking[0][1]
        others = f" (the first of {len(lacking)} such shards)" if len(lacking) > 1 else ""
        raise DpoCacheError(
            f"mixture {mixture.name} lacks {len(keys)} pairs ({name_keys(keys)}): {first.found}{others}",
            expected=first.expected,
            next_step=remedy,
        ) from first
    if len(keys := np.concatenate(unscored)):
        raise DpoCacheError(
            f"{len(keys)} pairs of mixture {mixture.name} count no scored token: {name_keys(keys)}", next_step=remedy
        )
    if len(keys := np.concatenate([bad_keys for bad_keys, _ in unusable])):
        values = {name: np.concatenate([columns[name] for _, columns in unusable]) for name in VALUE_COLUMNS}
        raise DpoCacheError(
            f"{len(keys)} pairs of mixture {mixture.name} have reference values that are missing, not finite or not "
            f"below zero: {unusable_in_words(keys, values)}",
            next_step=remedy,
        )


def check_common_values(cache: ReferenceCache, mixture: Mixture) -> None:
    """Check that the sums over the common part are known for all pairs of a mixture that :func:`check_mixture` passed.

    Raises:
        DpoCacheError: With the number of pairs whose sums are not.
    """
    unknown = 0
    for _, path, _, rows in _by_shard(cache, mixture):
        with cache.shards.open(path) as reader:
            values = np.stack([reader.numbers(name)[rows] for name in COMMON_COLUMNS])
            unknown += int(np.isnan(values).any(axis=0).sum())
    if unknown:
        raise DpoCacheError(
            f"--ld-alpha needs the reference's sums up to the length of each pair's shorter response, and "
            f"{unknown} pairs of mixture {mixture.name} were imported without them",
            expected="pairs that dpo-cache build scored",
            next_step="score them into a cache of their own (dpo-cache build --cache OTHER …), or leave --ld-alpha out",
        )


def _check_table(mixture: Mixture) -> None:
    table = mixture.table
    if table.training_set_digest() != mixture.digest:
        raise DpoCacheError(f"{table.path} is not the training set that the pointer {mixture.name}.json states")
    shard_numbers = table.column("shard")
    if not 0 <= shard_numbers.min() <= shard_numbers.max() < len(mixture.shards):
        raise DpoCacheError(f"{table.path} names a shard that the pointer {mixture.name}.json does not list")
    for name in ("prompt_length", "chosen_length", "rejected_length"):
        if table.column(name).min() < 1:
            raise DpoCacheError(f"{table.path} states a {name} below 1")


def _by_shard(cache: ReferenceCache, mixture: Mixture) -> Iterator[tuple[ShardRef, Path, Keys, npt.NDArray[np.int32]]]:
    """Each shard with the keys and row numbers of the mixture's rows that lie in it.

    Shards are taken a few at a time, and only the blocks of the table that have rows in them are read, so memory
    holds a part of the table however large it is: four bytes a pair of the whole.
    """
    shard_numbers = mixture.table.column("shard")
    batch_of_shard = np.cumsum(np.bincount(shard_numbers, minlength=len(mixture.shards))) // ROWS_AT_ONCE
    blocks_of_batch: dict[int, list[int]] = defaultdict(list)
    for number, start in enumerate(range(0, len(shard_numbers), mixture.block_rows)):
        for batch in np.unique(batch_of_shard[shard_numbers[start : start + mixture.block_rows]]).tolist():
            blocks_of_batch[batch].append(number)
    for batch in sorted(blocks_of_batch):
        keys, shards, rows = _rows_of_batch(mixture, blocks_of_batch[batch], batch_of_shard == batch)
        numbers, starts = np.unique(shards, return_index=True)
        for number, start, stop in zip(numbers.tolist(), starts, [*starts[1:], len(shards)], strict=True):
            shard = mixture.shards[number]
            yield shard, cache.shards.path_of(shard), keys[start:stop], rows[start:stop]


def _rows_of_batch(
    mixture: Mixture, blocks: list[int], is_in_batch: npt.NDArray[np.bool_]
) -> tuple[Keys, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Keys, shards and row numbers of these blocks' rows in some shards, by shard."""
    parts = []
    for number in blocks:
        block = mixture.table.block(number)
        chosen = is_in_batch[block.shards]
        parts.append((block.keys[chosen], block.shards[chosen], block.rows[chosen]))
    keys, shards, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(shards, kind="stable")
    return keys[order], shards[order], rows[order]


def _open_as_stated(cache: ReferenceCache, mixture: Mixture, path: Path, shard: ShardRef) -> ShardReader:
    reader = cache.shards.open(path)
    if mixture.has_token_logps and not reader.has_token_logps:
        reader.close()
        raise DpoCacheError(f"{path} has no log-probabilities per token, which the pointer {mixture.name}.json states")
    if (reader.num_rows, reader.num_bytes) != (shard.num_rows, shard.num_bytes):
        reader.close()
        raise DpoCacheError(
            f"{path} has {reader.num_rows} rows and {reader.num_bytes} bytes",
            expected=f"{shard.num_rows} rows and {shard.num_bytes} bytes",
        )
    return reader


def _values_and_tokens(
    reader: ShardReader, path: Path, wanted: npt.NDArray[np.bytes_], rows: npt.NDArray[np.int32]
) -> tuple[PairValues, npt.NDArray[np.int32]]:
    """The values of these rows, which must have the wanted keys, and the scored tokens of the side with fewer."""
    if not 0 <= rows.min() <= rows.max() < reader.num_rows:
        raise DpoCacheError(f"{path} has {reader.num_rows} rows; row {int(rows.max())} is asked for")
    elsewhere = reader.keys()[rows] != wanted
    if elsewhere.any():
        raise DpoCacheError(f"{path} holds other keys in {int(elsewhere.sum())} of these rows")
    tokens = np.minimum(reader.numbers("chosen_tokens")[rows], reader.numbers("rejected_tokens")[rows])
    return {name: reader.numbers(name)[rows] for name in VALUE_COLUMNS}, tokens

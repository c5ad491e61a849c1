"""A shard: scored pairs in one immutable Parquet file named by the SHA-256 of its bytes.

Shapes: N pairs of a row group.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import DpoCacheError
from ..data.token_pair import TokenPair
from .canonical_json import JsonObject, canonical_bytes, parse_object
from .durable_file import write_durably
from .example_key import KEY_BYTES, KEY_VERSION, Keys, canonical_scored_mask, example_key, key_at
from .parquet_file import (
    KEY_COLUMN,
    ParquetReader,
    file_sha256,
    keys_of,
    numbers_of,
    one_array,
    parquet_bytes,
    reading,
)

FORMAT_VERSION = 1
SHARD_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
MAX_ROW_GROUP_PAIRS = 512
MAX_ROW_GROUP_IDS = 32_768
"""Small row groups: shuffled reading decodes a whole one for a single pair."""


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field(KEY_COLUMN, pa.binary(KEY_BYTES), nullable=False),
        pa.field("prompt_ids", _list_of(pa.int32()), nullable=False),
        pa.field("chosen_ids", _list_of(pa.int32()), nullable=False),
        pa.field("rejected_ids", _list_of(pa.int32()), nullable=False),
        pa.field("scored_mask", _list_of(pa.bool_()), nullable=True),
        pa.field("ref_chosen_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_logps", pa.float64(), nullable=False),
        pa.field("ref_chosen_common_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_common_logps", pa.float64(), nullable=False),
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("ref_chosen_token_logps", _list_of(pa.float32()), nullable=True),
        pa.field("ref_rejected_token_logps", _list_of(pa.float32()), nullable=True),
    ]
)
VALUE_COLUMNS = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_chosen_common_logps",
    "ref_rejected_common_logps",
)
COMMON_COLUMNS = VALUE_COLUMNS[2:]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredPair:
    """One row of a cache: the ids that were scored and what the reference says of them.

    Attributes:
        key: :func:`~.example_key.example_key` of ``pair``, 32 bytes.
        pair: The token ids and scored mask.
        ref_chosen_logps: Sum of the reference's log-probabilities (nats) over the chosen side's scored tokens.
        ref_rejected_logps: The same for the rejected side.
        ref_chosen_common_logps: Sum over the first ``min(chosen_tokens, rejected_tokens)`` scored tokens only; NaN
            where it is not known, in imported rows.
        ref_rejected_common_logps: The same for the rejected side.
        chosen_tokens: How many tokens of the chosen side are scored.
        rejected_tokens: How many of the rejected side.
        chosen_token_logps: The chosen side's value per scored token in order, shape (chosen_tokens,), if kept.
        rejected_token_logps: The rejected side's, shape (rejected_tokens,), if kept.
    """

    key: bytes
    pair: TokenPair
    ref_chosen_logps: float
    ref_rejected_logps: float
    ref_chosen_common_logps: float
    ref_rejected_common_logps: float
    chosen_tokens: int
    rejected_tokens: int
    chosen_token_logps: npt.NDArray[np.float32] | None = None
    rejected_token_logps: npt.NDArray[np.float32] | None = None

    @property
    def is_valid(self) -> bool:
        """Whether a reference can have given these values; see :func:`unusable_values`."""
        return not unusable_values({name: np.array([getattr(self, name)]) for name in VALUE_COLUMNS}).any()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """What a mixture says of a shard: its digest in hex, which is its name, its rows and its size."""

    sha256: str
    num_rows: int
    num_bytes: int

    @property
    def file_name(self) -> str:
        return f"{self.sha256}.parquet"


def write_shard(
    shards_folder: Path,
    rows: Sequence[ScoredPair],
    *,
    reference_id: str,
    scoring_version: int,
    recorded: Mapping[str, Any],
    temporary_folder: Path,
) -> ShardRef:
    """Write one finished unit of work. The same rows, reference and record give the same file.

    Args:
        shards_folder: Where the shard becomes visible, under the digest of its bytes.
        rows: At least one, in the order they are to have. Their counts and keys must be right.
        reference_id: Digest of the reference that scored them.
        scoring_version: Version of the scoring code, in the footer for readers without ``cache.json``.
        recorded: How they were scored (library versions, hardware, batch layout). Not part of any key, but of
            the bytes, so nothing that changes by itself, like a clock, belongs here.
        temporary_folder: For the unfinished file.

    Raises:
        DpoCacheError: A value is not finite or not below zero, naming the pair; or the disk refused.
    """
    assert rows
    _refuse_unusable_values(rows)
    content = parquet_bytes(
        (_table(rows[start:stop]) for start, stop in _row_group_bounds(rows)),
        SCHEMA,
        metadata={
            "dpo_cache.format_version": str(FORMAT_VERSION),
            "dpo_cache.reference_id": reference_id,
            "dpo_cache.key_version": str(KEY_VERSION),
            "dpo_cache.scoring_version": str(scoring_version),
            "dpo_cache.recorded": canonical_bytes(dict(recorded)).decode(),
        },
        rows_per_group=MAX_ROW_GROUP_PAIRS,
    )
    shard = ShardRef(sha256=hashlib.sha256(content).hexdigest(), num_rows=len(rows), num_bytes=content.size)
    write_durably(shards_folder / shard.file_name, memoryview(content), temporary_folder=temporary_folder)
    return shard


class ShardReader:
    """An open shard of a known format; its content is checked as it is read, its whole-file digest is not.

    Raises:
        DpoCacheError: It cannot be read as a shard of this format version.
    """

    def __init__(self, path: Path) -> None:
        self._parquet = ParquetReader(path, SCHEMA)
        try:
            self.reference_id = _checked_reference_id(path, self._parquet.metadata)
        except BaseException:
            self._parquet.close()
            raise
        self.path = path
        self.num_rows = self._parquet.num_rows
        self.num_bytes = self._parquet.num_bytes
        self.group_starts = self._parquet.group_starts

    @property
    def recorded(self) -> JsonObject:
        """How the rows were scored."""
        return parse_object(self._parquet.metadata.get("dpo_cache.recorded", "{}").encode(), source=self.path)

    def keys(self) -> Keys:
        """The keys of all rows, shape (num_rows,)."""
        with reading(self.path):
            return keys_of(self._parquet.read_column(KEY_COLUMN))

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """One numeric column of all rows, shape (num_rows,)."""
        with reading(self.path):
            return numbers_of(self._parquet.read_column(column))

    def row_group_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which row group holds each row."""
        return np.searchsorted(self.group_starts, rows, side="right") - 1

    def read_row_group(self, group: int) -> RowGroup:
        """Decode one row group and check ids, masks, counts and values.

        Raises:
            DpoCacheError: Something in it contradicts itself or the format.
        """
        with reading(self.path):
            return RowGroup(self._parquet.read([group]), first_row=int(self.group_starts[group]))

    def close(self) -> None:
        self._parquet.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowGroup:
    """Decoded rows of a shard as numpy arrays; a pair is taken out as views, without a copy."""

    def __init__(self, table: pa.Table, *, first_row: int) -> None:
        self.first_row = first_row
        self.num_bytes: int = table.nbytes
        columns = {name: one_array(table.column(name)) for name in table.column_names}
        self.keys = keys_of(columns[KEY_COLUMN])
        self._prompt = _Lists(columns["prompt_ids"])
        self._chosen = _Lists(columns["chosen_ids"])
        self._rejected = _Lists(columns["rejected_ids"])
        self._mask = _Lists(columns["scored_mask"])
        self._chosen_token_logps = _Lists(columns["ref_chosen_token_logps"])
        self._rejected_token_logps = _Lists(columns["ref_rejected_token_logps"])
        self._values = {name: numbers_of(columns[name]) for name in VALUE_COLUMNS}
        self._chosen_tokens = numbers_of(columns["chosen_tokens"])
        self._rejected_tokens = numbers_of(columns["rejected_tokens"])
        self._check()

    def __len__(self) -> int:
        return len(self.keys)

    def scored_pair(self, index: int) -> ScoredPair:
        """Row ``first_row + index``; its key is as stored, not recomputed."""
        return ScoredPair(
            key=key_at(self.keys, index),
            pair=TokenPair(
                prompt_ids=self._prompt[index],
                chosen_ids=self._chosen[index],
                rejected_ids=self._rejected[index],
                scored_mask=self._mask.get(index),
            ),
            ref_chosen_logps=float(self._values["ref_chosen_logps"][index]),
            ref_rejected_logps=float(self._values["ref_rejected_logps"][index]),
            ref_chosen_common_logps=float(self._values["ref_chosen_common_logps"][index]),
            ref_rejected_common_logps=float(self._values["ref_rejected_common_logps"][index]),
            chosen_tokens=int(self._chosen_tokens[index]),
            rejected_tokens=int(self._rejected_tokens[index]),
            chosen_token_logps=self._chosen_token_logps.get(index),
            rejected_token_logps=self._rejected_token_logps.get(index),
        )

    def _check(self) -> None:
        for ids in (self._prompt, self._chosen, self._rejected):
            if ids.absent.any() or (ids.lengths < 1).any():
                raise ValueError("a prompt or answer has no tokens")
            if len(ids.values) and ids.values.min() < 0:
                raise ValueError("a token id is negative")
        unusable = unusable_values(self._values)
        if unusable.any():
            raise ValueError(
                f"{int(unusable.sum())} pairs have reference values that are not finite or not below zero, "
                f"the first {key_at(self.keys, int(unusable.argmax())).hex()}"
            )
        self._check_counts()
        for token_logps, tokens in (
            (self._chosen_token_logps, self._chosen_tokens),
            (self._rejected_token_logps, self._rejected_tokens),
        ):
            if (~token_logps.absent & (token_logps.lengths != tokens)).any():
                raise ValueError("there are not as many values per token as scored tokens")

    def _check_counts(self) -> None:
        """Scored counts equal what the masks say; a mask covers its pair and never the first token."""
        plain = self._mask.absent
        right = (self._chosen_tokens == self._chosen.lengths) & (self._rejected_tokens == self._rejected.lengths)
        for index in np.flatnonzero(~plain).tolist():
            mask = self._mask[index]
            pair = self.scored_pair(index).pair
            right[index] = (
                len(mask) == pair.shared_prefix_tokens
                and not mask[0]
                and pair.chosen_tokens == self._chosen_tokens[index]
                and pair.rejected_tokens == self._rejected_tokens[index]
            )
        if not right.all() or (self._chosen_tokens < 1).any() or (self._rejected_tokens < 1).any():
            wrong = int(np.argmin(right & (self._chosen_tokens >= 1) & (self._rejected_tokens >= 1)))
            raise ValueError(f"the scored counts of {key_at(self.keys, wrong).hex()} contradict its mask")


class _Lists:
    """A list column: flat values, and where each row's part lies."""

    def __init__(self, column: pa.ListArray) -> None:
        offsets = column.offsets.to_numpy(zero_copy_only=True)
        values = column.values
        if values.null_count:
            raise ValueError("a list holds a missing value")
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(values):
            raise ValueError("a list column contradicts itself")
        self.values: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        self._starts, self._stops = offsets[:-1], offsets[1:]
        self.lengths: npt.NDArray[np.int32] = self._stops - self._starts
        self.absent: npt.NDArray[np.bool_] = (
            column.is_null().to_numpy(zero_copy_only=False)
            if column.null_count
            else np.zeros(len(column), dtype=np.bool_)
        )

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.values[self._starts[index] : self._stops[index]]

    def get(self, index: int) -> npt.NDArray[Any] | None:
        return None if self.absent[index] else self[index]


def read_shard_keys(path: Path) -> Keys:
    """The keys of all rows of a shard."""
    with ShardReader(path) as shard:
        return shard.keys()


def read_shard_rows(path: Path, rows: Sequence[int] | None = None) -> list[ScoredPair]:
    """Rows of a shard by number in the order asked for, all of them by default; keys are as stored."""
    with ShardReader(path) as shard:
        wanted = np.arange(shard.num_rows) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < shard.num_rows:
            raise DpoCacheError(f"{path} has {shard.num_rows} rows; row {int(wanted.max())} was asked for")
        groups = shard.row_group_of(wanted)
        decoded = {int(group): shard.read_row_group(int(group)) for group in np.unique(groups)}
        return [
            decoded[int(group)].scored_pair(int(row) - decoded[int(group)].first_row)
            for row, group in zip(wanted, groups, strict=True)
        ]


def iterate_shard(path: Path) -> Iterator[ScoredPair]:
    """All rows of a shard in order, one row group in memory at a time, each with its key recomputed.

    Raises:
        DpoCacheError: The shard cannot be read, or a key is not that of its ids.
    """
    with ShardReader(path) as shard:
        for group in range(len(shard.group_starts)):
            rows = shard.read_row_group(group)
            for index in range(len(rows)):
                pair = rows.scored_pair(index)
                check_key(pair, path)
                yield pair


def check_key(row: ScoredPair, path: Path) -> None:
    """Recompute a row's key from its ids; a difference is a :class:`DpoCacheError`."""
    if example_key(row.pair) != row.key:
        raise DpoCacheError(
            f"{path}: the key {row.key.hex()} is not that of its token ids",
            next_step=f"drop what is damaged with: dpo-cache verify --repair {path.parent.parent}",
        )


def verify_shard(path: Path) -> None:
    """Check that the file's bytes are those its name promises.

    Raises:
        DpoCacheError: They are not, or its name is no digest.
    """
    if not SHARD_NAME.fullmatch(path.name):
        raise DpoCacheError(f"{path} is not a shard: its name is not a SHA-256")
    if (found := file_sha256(path)) != path.stem:
        raise DpoCacheError(
            f"{path} is damaged: its bytes have the SHA-256 {found}",
            next_step=f"drop what is damaged with: dpo-cache verify --repair {path.parent.parent}",
        )


def unusable_values(values: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.bool_]:
    """Which rows hold a value no reference can have given.

    A sum of log-probabilities is finite and below zero; exactly zero is what a missing value looks like. The
    sums over the common part may be zero: they can stand for a single token the reference was sure of. And they may
    be NaN, which means that nobody knows them: imported rows come with whole sums alone. Scoring cannot make one
    NaN without the whole sum, which is over the same tokens and more.
    """
    unusable = np.zeros(len(values[VALUE_COLUMNS[0]]), dtype=np.bool_)
    for name in VALUE_COLUMNS:
        value = values[name]
        if name in COMMON_COLUMNS:
            unusable |= ~np.isnan(value) & ~(np.isfinite(value) & (value <= 0))
        else:
            unusable |= ~(np.isfinite(value) & (value < 0))
    return unusable


def _refuse_unusable_values(rows: Sequence[ScoredPair]) -> None:
    unusable = unusable_values({name: np.array([getattr(row, name) for row in rows]) for name in VALUE_COLUMNS})
    if unusable.any():
        row = rows[int(unusable.argmax())]
        raise DpoCacheError(
            f"{int(unusable.sum())} pairs were scored with values that are not finite or not below zero, "
            f"the first {row.key.hex()}: chosen {row.ref_chosen_logps}, rejected {row.ref_rejected_logps}"
        )


def _row_group_bounds(rows: Sequence[ScoredPair]) -> Iterator[tuple[int, int]]:
    start = ids = 0
    for index, row in enumerate(rows):
        length = row.pair.shared_prefix_tokens
        if index > start and (ids + length > MAX_ROW_GROUP_IDS or index - start == MAX_ROW_GROUP_PAIRS):
            yield start, index
            start, ids = index, 0
        ids += length
    yield start, len(rows)


def _table(rows: Sequence[ScoredPair]) -> pa.Table:
    columns: dict[str, Any] = {
        KEY_COLUMN: pa.array([row.key for row in rows], type=pa.binary(KEY_BYTES)),
        "prompt_ids": _lists([row.pair.prompt_ids for row in rows], np.int32),
        "chosen_ids": _lists([row.pair.chosen_ids for row in rows], np.int32),
        "rejected_ids": _lists([row.pair.rejected_ids for row in rows], np.int32),
        "scored_mask": _lists([canonical_scored_mask(row.pair) for row in rows], np.bool_),
        "chosen_tokens": pa.array([row.chosen_tokens for row in rows], type=pa.int32()),
        "rejected_tokens": pa.array([row.rejected_tokens for row in rows], type=pa.int32()),
        "ref_chosen_token_logps": _lists([row.chosen_token_logps for row in rows], np.float32),
        "ref_rejected_token_logps": _lists([row.rejected_token_logps for row in rows], np.float32),
    }
    for name in VALUE_COLUMNS:
        columns[name] = pa.array([getattr(row, name) for row in rows], type=pa.float64())
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _lists(rows: Sequence[npt.NDArray[Any] | None], kind: type[np.generic]) -> pa.ListArray:
    """A list column from arrays, None for a missing one, without making Python numbers of the entries."""
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present).astype(kind, copy=False) if present else np.empty(0, dtype=kind)
    values = pa.array(flat)
    absent = pa.array([row is None for row in rows]) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=_list_of(values.type), mask=absent)


def _checked_reference_id(path: Path, metadata: Mapping[str, str]) -> str:
    version = metadata.get("dpo_cache.format_version", "none")
    if version != str(FORMAT_VERSION):
        raise DpoCacheError(
            f"{path} has format version {version[:20]}",
            expected=f"version {FORMAT_VERSION}",
            next_step="use the dpo-cache that wrote it, or build again",
        )
    if metadata.get("dpo_cache.key_version") != str(KEY_VERSION):
        raise DpoCacheError(f"{path} has keys of another version", expected=f"key version {KEY_VERSION}")
    return metadata.get("dpo_cache.reference_id", "")

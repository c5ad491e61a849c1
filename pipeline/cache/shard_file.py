"""A shard: scored pairs in one immutable Parquet file named by the SHA-256 of its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import DpoCacheError, as_argument
from .canonical_json import JsonObject, parse_object
from .example_key import KEY_BYTES, KEY_VERSION, Keys, example_key
from .format_version import FORMAT_VERSION, other_version, require_format_version
from .parquet_file import KEY_COLUMN, ParquetReader, file_sha256, reading
from .row_group import RowGroup
from .scored_pair import COMMON_COLUMNS, ScoredPair

SHARD_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
TOKEN_LOGPS_KEY = "dpo_cache.token_logps"
"""In the footer of a shard that has log-probabilities per token, with the value ``true``."""


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list without missing entries; ``element`` is how the Parquet specification calls them."""
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field(KEY_COLUMN, pa.binary(KEY_BYTES), nullable=False),
        pa.field("prompt_ids", list_of(pa.int32()), nullable=False),
        pa.field("chosen_ids", list_of(pa.int32()), nullable=False),
        pa.field("rejected_ids", list_of(pa.int32()), nullable=False),
        pa.field("scored_mask", list_of(pa.bool_()), nullable=True),
        pa.field("ref_chosen_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_logps", pa.float64(), nullable=False),
        pa.field("ref_chosen_common_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_common_logps", pa.float64(), nullable=False),
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("ref_chosen_token_logps", list_of(pa.float32()), nullable=True),
        pa.field("ref_rejected_token_logps", list_of(pa.float32()), nullable=True),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRef:
    """What a mixture says of a shard: its digest in hex, which is its name, its rows and its size."""

    sha256: str
    num_rows: int
    num_bytes: int

    @property
    def file_name(self) -> str:
        """Its name in ``shards/``."""
        return f"{self.sha256}.parquet"


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
    def ref(self) -> ShardRef:
        """What a mixture says of it."""
        return ShardRef(sha256=self.path.stem, num_rows=self.num_rows, num_bytes=self.num_bytes)

    @property
    def has_token_logps(self) -> bool:
        """Whether all rows have log-probabilities per token; else none has."""
        return self._parquet.metadata.get(TOKEN_LOGPS_KEY) == "true"

    @property
    def has_unknown_values(self) -> bool:
        """Whether some row's sums over the common part are not known, as of imported rows."""
        return any(bool(np.isnan(self.numbers(name)).any()) for name in COMMON_COLUMNS)

    @property
    def num_ids(self) -> int:
        """Token ids of all rows."""
        return sum(self._parquet.num_values(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))

    @property
    def recorded(self) -> JsonObject:
        """How the rows were scored."""
        return parse_object(self._parquet.metadata.get("dpo_cache.recorded", "{}").encode(), source=self.path)

    def keys(self) -> Keys:
        """The keys of all rows, shape (num_rows,)."""
        return self._parquet.whole_column(KEY_COLUMN)

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """One numeric column of all rows, shape (num_rows,)."""
        return self._parquet.whole_column(column)

    def row_group_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which row group holds each row."""
        return np.searchsorted(self.group_starts, rows, side="right") - 1

    def read_row_group(self, group: int) -> RowGroup:
        """Decode one row group and check ids, masks, counts and values.

        Raises:
            DpoCacheError: Something in it contradicts itself or the format.
        """
        with reading(self.path):
            return RowGroup(
                self._parquet.read([group]),
                first_row=int(self.group_starts[group]),
                has_token_logps=self.has_token_logps,
            )

    def close(self) -> None:
        self._parquet.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_shard_rows(path: Path, rows: Sequence[int]) -> list[ScoredPair]:
    """Rows of a shard by number, in the order asked for; keys are as stored.

    Raises:
        DpoCacheError: The shard cannot be read, or has no such row.
    """
    with ShardReader(path) as shard:
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < shard.num_rows:
            raise DpoCacheError(f"{path} has {shard.num_rows} rows; row {int(wanted.max())} was asked for")
        groups = shard.row_group_of(wanted)
        decoded = {int(group): shard.read_row_group(int(group)) for group in np.unique(groups)}
        return [
            decoded[int(group)].scored_pair(int(row) - decoded[int(group)].first_row)
            for row, group in zip(wanted, groups, strict=True)
        ]


def check_key(row: ScoredPair, path: Path) -> None:
    """Recompute a row's key from its ids.

    Raises:
        DpoCacheError: It is another one.
    """
    if example_key(row.pair) != row.key:
        raise DpoCacheError(
            f"{path}: the key {row.key.hex()} is not that of its token ids",
            next_step=f"drop what is damaged with: dpo-cache verify --repair {as_argument(path.parent.parent)}",
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
            f"{path} is damaged: its bytes have the SHA-256 {found[:12]}…",
            next_step=f"drop what is damaged with: dpo-cache verify --repair {as_argument(path.parent.parent)}",
        )


def _checked_reference_id(path: Path, metadata: Mapping[str, str]) -> str:
    stated = metadata.get("dpo_cache.format_version")  # a footer holds texts
    require_format_version(FORMAT_VERSION if stated == str(FORMAT_VERSION) else stated, path)
    if metadata.get("dpo_cache.key_version") != str(KEY_VERSION):
        raise other_version(f"{path} has keys of another version", expected=f"key version {KEY_VERSION}")
    return metadata.get("dpo_cache.reference_id", "")

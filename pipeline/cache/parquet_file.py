"""Parquet as this cache writes it, and as it dares to read it from a stranger.

Writing: zstd, a checksum on every page, no statistics, no clock, so equal tables give equal bytes.
Reading: the footer is held against fixed limits and the exact schema, page promises against the footer, page
checksums are verified, and every fault comes out as one :class:`DpoCacheError` that names the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DpoCacheError
from .example_key import KEY_BYTES, Keys
from .parquet_pages import check_column_pages

KEY_COLUMN = "example_key"
MAX_FILE_BYTES = 1 << 36
MAX_FOOTER_BYTES = 1 << 28
MAX_ROW_GROUP_ROWS = 1 << 16
MAX_ROW_GROUP_BYTES = 1 << 28
MAX_COLUMN_VALUES = 1 << 26
"""The longest list column of one row group: 64 Mi token ids, far above any context length."""


def parquet_bytes(
    row_groups: Iterable[pa.Table], schema: pa.Schema, *, metadata: Mapping[str, str], rows_per_group: int
) -> pa.Buffer:
    """A whole Parquet file in memory, the same bytes for the same tables and metadata.

    Args:
        row_groups: Tables of ``schema``, each cut into row groups of ``rows_per_group`` rows.
        schema: Its key column stays uncompressed: digests do not compress, and the rows a file may claim are
            then bounded by its size.
        metadata: Key-value pairs of the footer.
        rows_per_group: Rows of a row group; the last one of each table may have fewer.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression={path: "none" if path == KEY_COLUMN else "zstd" for path in _leaf_paths(schema)},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=rows_per_group)
        writer.add_key_value_metadata(dict(metadata))
    return sink.getvalue()


class ParquetReader:
    """An open Parquet file whose footer has been checked; a context manager.

    Args:
        path: The file.
        schema: Exactly the columns it must have.

    Raises:
        DpoCacheError: It is missing, damaged, not Parquet, of another schema, or claims more than it can hold.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._checked: set[tuple[int, int]] = set()
        with reading(path):
            self._stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
        try:
            with reading(path):
                self._open(schema)
        except BaseException:
            self._stream.close()
            raise

    def _open(self, schema: pa.Schema) -> None:
        status = os.fstat(self._stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        self.num_bytes = status.st_size
        if not 12 < self.num_bytes <= MAX_FILE_BYTES:
            raise ValueError(f"a file of {self.num_bytes} bytes")
        tail = os.pread(self._stream.fileno(), 8, self.num_bytes - 8)
        if int.from_bytes(tail[:4], "little") > min(MAX_FOOTER_BYTES, self.num_bytes):
            raise ValueError("its footer claims more bytes than it may have")
        self._file = pq.ParquetFile(
            self._stream,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=1 << 22,
        )
        footer = self._file.metadata
        if not footer.schema.to_arrow_schema().equals(schema.remove_metadata()):
            raise ValueError("its columns are not those of this format")
        self.num_rows: int = footer.num_rows
        self.group_rows = np.array(
            [footer.row_group(group).num_rows for group in range(footer.num_row_groups)], dtype=np.int64
        )
        if (self.group_rows < 1).any() or (self.group_rows > MAX_ROW_GROUP_ROWS).any():
            raise ValueError("a row group claims an impossible number of rows")
        if self.group_rows.sum() != self.num_rows or self.num_rows * KEY_BYTES > self.num_bytes:
            raise ValueError("the footer's row counts do not agree with each other or with the file's size")
        self.group_starts = np.concatenate([[0], np.cumsum(self.group_rows)[:-1]])
        self._columns_of = _columns_by_name(schema)

    @property
    def metadata(self) -> dict[str, str]:
        """The footer's key-value pairs."""
        with reading(self.path):
            pairs = self._file.metadata.metadata or {}
            return {key.decode(): value.decode() for key, value in pairs.items()}

    def read(self, row_groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Decode row groups, all columns or those named, after checking what their pages promise."""
        with reading(self.path):
            names = list(self._columns_of) if columns is None else list(columns)
            for group in row_groups:
                self._check_pages(group, names)
            return self._file.read_row_groups(list(row_groups), columns=columns, use_threads=False)

    def read_column(self, name: str) -> pa.Array:
        """One column without nulls, whole, as one array."""
        with reading(self.path):
            column = self.read(range(len(self.group_rows)), [name]).column(0)
            return one_array(column)

    def close(self) -> None:
        self._file.close()
        self._stream.close()

    def __enter__(self) -> ParquetReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_pages(self, group: int, names: Sequence[str]) -> None:
        entry = self._file.metadata.row_group(group)
        for name in names:
            index = self._columns_of[name]
            if (group, index) in self._checked:
                continue
            column = entry.column(index)
            if (
                not 0 <= column.num_values <= MAX_COLUMN_VALUES
                or not 0 <= column.total_uncompressed_size <= MAX_ROW_GROUP_BYTES
            ):
                raise ValueError(f"column {name} of row group {group} claims an impossible size")
            check_column_pages(self._stream.fileno(), column, file_bytes=self.num_bytes)
            self._checked.add((group, index))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside while reading ``path`` leaves as a :class:`DpoCacheError` that names it."""
    try:
        yield
    except DpoCacheError:
        raise
    except FileNotFoundError as error:
        raise DpoCacheError(f"{path} is missing", next_step="restore it from a copy, or build again") from error
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise DpoCacheError(
            f"{path} cannot be read: {_first_line(error)}",
            next_step=f"find all damage with: dpo-cache verify {path.parent.parent}",
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file in hex, read in chunks."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A table's column as one array."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def keys_of(column: pa.Array) -> Keys:
    """A fixed-size binary column as numpy ``S32``, without a copy."""
    buffer = column.buffers()[1]
    start = column.offset * KEY_BYTES
    return np.frombuffer(buffer, dtype=f"S{KEY_BYTES}", count=len(column), offset=start)


def numbers_of(column: pa.Array) -> npt.NDArray[Any]:
    """A numeric column without nulls as numpy, without a copy."""
    if column.null_count:
        raise ValueError("a value is missing")
    return np.asarray(column.to_numpy(zero_copy_only=True))


def _columns_by_name(schema: pa.Schema) -> dict[str, int]:
    """Every column here has one leaf, so the leaf's number is the column's."""
    return {name: index for index, name in enumerate(schema.names)}


def _leaf_paths(schema: pa.Schema) -> list[str]:
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]

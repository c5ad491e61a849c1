"""Parquet as this cache writes it, and as it dares to read it from a stranger.

Writing: zstd, a checksum on every page, no statistics, no clock, so equal tables give equal bytes.
Reading: footer and page headers are checked first (:mod:`.parquet_footer`), page checksums are verified, and every
fault comes out as one :class:`DpoCacheError` that names the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DpoCacheError, as_argument, first_line
from .example_key import KEY_BYTES, Keys
from .parquet_footer import check_pages, leaves_of, read_footer
from .unreadable_file import read_fault

KEY_COLUMN = "example_key"


def parquet_bytes(
    row_groups: Iterable[pa.Table], schema: pa.Schema, *, metadata: Mapping[str, str], rows_per_group: int
) -> memoryview:
    """A whole Parquet file in memory, the same bytes for the same tables and metadata.

    Args:
        row_groups: Tables of ``schema``, each cut into row groups of ``rows_per_group`` rows.
        schema: Its key column stays uncompressed: digests do not compress, and the rows a file may claim are
            then bounded by its size.
        metadata: Key-value pairs of the footer.
        rows_per_group: Rows of a row group; the last one of each table may have fewer.
    """
    sink = BytesIO()  # Arrow's own stream takes four times the memory of a file that is written block by block
    with pq.ParquetWriter(
        sink,
        schema,
        compression={path: "none" if path == KEY_COLUMN else "zstd" for path in _column_paths(schema)},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=rows_per_group)
        writer.add_key_value_metadata(dict(metadata))
    return sink.getbuffer()


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
        with reading(path):
            self._stream = _open_regular(path)
            try:
                self._open(schema)
            except BaseException:
                self._stream.close()
                raise

    def _open(self, schema: pa.Schema) -> None:
        self.num_bytes = os.fstat(self._stream.fileno()).st_size
        footer = read_footer(self._stream.fileno(), file_bytes=self.num_bytes, schema=schema)
        self.metadata = footer.metadata
        self.group_rows = footer.group_rows
        self.group_starts = np.cumsum(footer.group_rows) - footer.group_rows
        self.num_rows = int(footer.group_rows.sum())
        if self.num_rows * KEY_BYTES > self.num_bytes:
            raise ValueError("it is too small for the rows it claims")
        self._chunks = footer.chunks
        self._checked = np.zeros(footer.chunks.shape[:2], dtype=np.bool_)
        self._names = schema.names
        self._file = pq.ParquetFile(self._stream, pre_buffer=False, page_checksum_verification=True)
        if not self._file.schema_arrow.equals(schema.remove_metadata()):
            raise ValueError("its columns are not those of this format")

    def num_values(self, name: str) -> int:
        """Entries of one column, those of its lists together."""
        return int(self._chunks[:, self._names.index(name), 3].sum())

    def read(self, row_groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Decode row groups, all columns or those named, after checking what their pages promise."""
        names = self._names if columns is None else columns
        with reading(self.path):
            for group in row_groups:
                for column in map(self._names.index, names):
                    if not self._checked[group, column]:
                        check_pages(self._stream.fileno(), self._chunks[group, column])
                        self._checked[group, column] = True
            return self._file.read_row_groups(list(row_groups), columns=list(names), use_threads=False)

    def arrays(self, row_groups: Sequence[int], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Numeric columns of some row groups, which may have no nulls, and the key column as ``S32``, by name."""
        with reading(self.path):
            table = self.read(row_groups, names)
            columns = {name: one_array(table.column(name)) for name in names}
            return {
                name: keys_of(column) if name == KEY_COLUMN else numbers_of(column) for name, column in columns.items()
            }

    def whole_column(self, name: str) -> npt.NDArray[Any]:
        """One column of all rows, as :meth:`arrays` gives it, shape (num_rows,)."""
        return self.arrays(range(len(self.group_rows)), [name])[name]

    def close(self) -> None:
        self._file.close()
        self._stream.close()

    def __enter__(self) -> ParquetReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside while reading ``path`` leaves as a :class:`DpoCacheError` that names it."""
    try:
        yield
    except DpoCacheError:
        raise
    except (OSError, MemoryError) as error:
        raise read_fault(path, error) from error
    except (ValueError, KeyError, IndexError, OverflowError, pa.ArrowException) as error:
        raise DpoCacheError(
            f"{path} cannot be read: {first_line(error)}",
            next_step=f"find all damage with: dpo-cache verify {as_argument(path.parent.parent)}",
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file in hex, read in chunks."""
    with reading(path), _open_regular(path) as stream:
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
    """A numeric column as numpy, without a copy.

    Raises:
        ValueError: A value is missing.
    """
    if column.null_count:
        raise ValueError("a value is missing")
    return np.asarray(column.to_numpy(zero_copy_only=True))


def _open_regular(path: Path) -> BufferedReader:
    """Open a file; a pipe or device that a stranger put in its place is refused without waiting for it."""
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError("it is not a regular file")
    return stream


def _column_paths(schema: pa.Schema) -> list[str]:
    return [b".".join(leaf.path).decode() for leaf in leaves_of(schema)]

"""A strict look at a Parquet file's own claims before a decoder believes them.

A footer can promise a trillion rows, a page of a hundred bytes two gigabytes, and the decoder allocates what it
is promised (some contradictions abort the whole process). So the footer and the page headers of what is about to
be read are parsed here first, and only the small part of Parquet that this cache writes is let through: the exact
schema, plain encoding, zstd or no compression, a checksum on every page, no dictionaries, statistics, indexes or
encryption, and sizes that agree with each other, with the file's and with fixed limits.

Field numbers are those of https://github.com/apache/parquet-format, ``parquet.thrift``.
Shapes: G row groups, C leaf columns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .thrift_compact import LIST, STRUCT, Struct, read_field_head, read_list_head, read_struct, read_value

MAX_FOOTER_BYTES = 1 << 26
MAX_SMALL_FOOTER_BYTES = 1 << 20
"""Beyond so much, a footer may take no more than a quarter of the file: in memory it takes many times its size. A shard
of ours has at most 1,024 row groups, each with less than 1 KiB in the footer; their pages may compress to less."""
MAX_ROW_GROUP_ROWS = 1 << 16
MAX_CHUNK_VALUES = 1 << 26
"""The longest list column of one row group: 64 Mi token ids, far above any context length."""
MAX_CHUNK_BYTES = 1 << 28
_MAX_ROW_GROUP_ENTRY_BYTES = 1 << 16
_MAX_PAGE_HEADER_BYTES = 256

_MAGIC = b"PAR1"
_PLAIN, _RLE = 0, 3
_DATA_PAGE, _DATA_PAGE_HEADER = 0, 5
_UNCOMPRESSED, _ZSTD = 0, 6
_PHYSICAL_TYPES = {
    pa.bool_(): 0,
    pa.int32(): 1,
    pa.int64(): 2,
    pa.uint64(): 2,
    pa.float32(): 4,
    pa.float64(): 5,
}
_FIXED_BINARY = 7
_REQUIRED, _OPTIONAL, _REPEATED = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """A column as Parquet stores it: where lists are flat and levels say which row an entry belongs to."""

    path: tuple[bytes, ...]
    physical_type: int
    max_repetition: int
    max_definition: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ParquetFooter:
    """The claims of a footer, found to be possible.

    Attributes:
        metadata: Its key-value pairs.
        group_rows: Rows of each row group, shape (G,).
        chunks: For each row group and column: offset, compressed bytes, uncompressed bytes, values;
            shape (G, C, 4).
    """

    metadata: dict[str, str]
    group_rows: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]


def read_footer(file: int, *, file_bytes: int, schema: pa.Schema) -> ParquetFooter:
    """Read and check the footer of an open file.

    Args:
        file: Its descriptor.
        file_bytes: Its size.
        schema: The columns it must have.

    Raises:
        ValueError: The footer is not one this cache writes.
    """
    tail = os.pread(file, 8, max(0, file_bytes - 8))
    if file_bytes < 12 or tail[4:] != _MAGIC or os.pread(file, 4, 0) != _MAGIC:
        raise ValueError("it is not a Parquet file, or cut short")
    footer_bytes = int.from_bytes(tail[:4], "little")
    if footer_bytes > min(MAX_FOOTER_BYTES, MAX_SMALL_FOOTER_BYTES + file_bytes // 4, file_bytes - 12):
        raise ValueError("its footer claims more bytes than it may have")
    data = os.pread(file, footer_bytes, file_bytes - 8 - footer_bytes)
    if len(data) != footer_bytes:
        raise ValueError("its footer is cut short")
    try:
        return _footer(data, data_end=file_bytes - 8 - footer_bytes, schema=schema)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer lacks something or holds another type") from error


def check_pages(file: int, chunk: npt.NDArray[np.int64]) -> None:
    """Check that the pages of a column chunk promise exactly what the footer says of it.

    Args:
        file: Descriptor of the file.
        chunk: One entry of :attr:`ParquetFooter.chunks`.

    Raises:
        ValueError: They do not, or are of another kind than this cache writes.
    """
    position, compressed_bytes, bytes_left, values_left = chunk.tolist()
    end = position + compressed_bytes
    while position < end:
        header, header_bytes = read_struct(os.pread(file, min(_MAX_PAGE_HEADER_BYTES, end - position), position))
        uncompressed, compressed, values = _page_sizes(header)
        bytes_left -= header_bytes + uncompressed
        values_left -= values
        position += header_bytes + compressed
    if position != end or bytes_left != 0 or values_left != 0:
        raise ValueError("pages promise other sizes than the footer")


def leaves_of(schema: pa.Schema) -> list[Leaf]:
    """The leaf columns of a schema of plain columns and lists of required entries."""
    leaves = []
    for field in schema:
        is_list = pa.types.is_list(field.type)
        kind = field.type.value_type if is_list else field.type
        leaves.append(
            Leaf(
                path=(field.name.encode(), b"list", b"element") if is_list else (field.name.encode(),),
                physical_type=_physical_type(kind),
                max_repetition=int(is_list),
                max_definition=int(is_list) + int(field.nullable),
            )
        )
    return leaves


def _footer(data: bytes, *, data_end: int, schema: pa.Schema) -> ParquetFooter:
    leaves = leaves_of(schema)
    fields: Struct = {}
    group_rows: list[int] = []
    chunks: list[npt.NDArray[np.int64]] = []
    number = position = 0
    while True:
        number, kind, position = read_field_head(data, position, number)
        if kind == 0:
            break
        if number not in (1, 2, 3, 4, 5, 6, 7):
            raise ValueError("its footer has a part that this format does not use")
        if number != 4:
            fields[number], position = read_value(data, position, kind)
            continue
        if kind != LIST:
            raise TypeError
        # One by one: what a hostile footer piles up in memory ends with the first entry that is wrong.
        element, count, position = read_list_head(data, position)
        if element != STRUCT:
            raise TypeError
        for _ in range(count):
            entry, entry_bytes = read_struct(data[position : position + _MAX_ROW_GROUP_ENTRY_BYTES])
            position += entry_bytes
            group_rows.append(_row_group_rows(entry))
            chunks.append(np.array(_row_group_chunks(entry, leaves, group_rows[-1], data_end), dtype=np.int64))
    if [_schema_element(element) for element in fields[2]] != _schema_elements(schema):
        raise ValueError("its columns are not those of this format")
    if fields[3] != sum(group_rows) or not group_rows:
        raise ValueError("its row counts do not agree")
    return ParquetFooter(
        metadata=_metadata(fields.get(5, [])),
        group_rows=np.array(group_rows, dtype=np.int64),
        chunks=np.stack(chunks),
    )


def _page_sizes(header: Struct) -> tuple[int, int, int]:
    """Uncompressed bytes, compressed bytes and values of a page, from its header."""
    plain = header.get(_DATA_PAGE_HEADER)
    # Field 4 is the checksum: nobody may leave it out.
    if set(header) != {1, 2, 3, 4, _DATA_PAGE_HEADER} or header[1] != _DATA_PAGE or not isinstance(plain, dict):
        raise ValueError("a page is not a plain data page with a checksum")
    if [plain.get(field) for field in (2, 3, 4)] != [_PLAIN, _RLE, _RLE] or plain.get(5, {}) != {}:
        raise ValueError("a page has an encoding or statistics that this format does not use")
    sizes = (header[2], header[3], plain.get(1))
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("a page claims an impossible size")
    return header[2], header[3], plain[1]


def _row_group_rows(entry: Struct) -> int:
    rows = entry[3]
    if not set(entry) <= {1, 2, 3, 5, 6, 7} or not isinstance(rows, int) or not 1 <= rows <= MAX_ROW_GROUP_ROWS:
        raise ValueError("a row group claims an impossible number of rows")
    return rows


def _row_group_chunks(entry: Struct, leaves: list[Leaf], rows: int, data_end: int) -> list[list[int]]:
    if len(entry[1]) != len(leaves):
        raise ValueError("a row group has other columns than the schema")
    return [_chunk(column, leaf, rows, data_end) for column, leaf in zip(entry[1], leaves, strict=True)]


def _chunk(column: Struct, leaf: Leaf, rows: int, data_end: int) -> list[int]:
    """Offset, compressed bytes, uncompressed bytes and values of a column chunk whose entry holds nothing else."""
    entry = column[3]
    if set(column) != {2, 3} or not set(entry) <= {1, 2, 3, 4, 5, 6, 7, 9, 13, 16}:
        raise ValueError("a column has a part that this format does not use")
    if entry[1] != leaf.physical_type or tuple(entry[3]) != leaf.path or not set(entry[2]) <= {_PLAIN, _RLE}:
        raise ValueError("a column has another type, name or encoding")
    histograms = entry.get(16)
    if histograms is not None and not _fit(histograms, leaf):
        raise ValueError("a column's level histograms do not fit its type")
    values, uncompressed, compressed, offset = entry[5], entry[6], entry[7], entry[9]
    if entry[4] not in (_UNCOMPRESSED, _ZSTD) or (entry[4] == _UNCOMPRESSED and compressed != uncompressed):
        raise ValueError("a column has another compression")
    if not rows <= values <= (MAX_CHUNK_VALUES if leaf.max_repetition else rows):
        raise ValueError("a column claims an impossible number of values")
    if not 0 < uncompressed <= MAX_CHUNK_BYTES or not len(_MAGIC) <= offset < offset + compressed <= data_end:
        raise ValueError("a column claims an impossible size or place")
    return [offset, compressed, uncompressed, values]


def _fit(histograms: Struct, leaf: Leaf) -> bool:
    """Optional counts of levels, which pyarrow's C++ side trusts to have one entry a level."""
    return set(histograms) <= {2, 3} and all(
        len(histograms.get(field, [])) in (0, levels + 1)
        for field, levels in ((2, leaf.max_repetition), (3, leaf.max_definition))
    )


def _metadata(pairs: list[Struct]) -> dict[str, str]:
    metadata = {pair[1].decode(): pair.get(2, b"").decode() for pair in pairs}
    if not all(name.startswith("dpo_cache.") for name in metadata):
        raise ValueError("its footer holds metadata that is not ours")
    return metadata


def _schema_element(element: Struct) -> tuple[object, ...]:
    """Type, length, repetition, name and number of children; annotations may differ between writers."""
    return tuple(element.get(number) for number in (1, 2, 3, 4, 5))


def _schema_elements(schema: pa.Schema) -> list[tuple[object, ...]]:
    elements: list[tuple[object, ...]] = [(None, None, _REQUIRED, b"schema", len(schema))]
    for field, leaf in zip(schema, leaves_of(schema), strict=True):
        repetition = _OPTIONAL if field.nullable else _REQUIRED
        length = field.type.byte_width if leaf.physical_type == _FIXED_BINARY else None
        if leaf.max_repetition:
            elements += [
                (None, None, repetition, leaf.path[0], 1),
                (None, None, _REPEATED, b"list", 1),
                (leaf.physical_type, None, _REQUIRED, b"element", None),
            ]
        else:
            elements.append((leaf.physical_type, length, repetition, leaf.path[0], None))
    return elements


def _physical_type(kind: pa.DataType) -> int:
    return _FIXED_BINARY if pa.types.is_fixed_size_binary(kind) else _PHYSICAL_TYPES[kind]

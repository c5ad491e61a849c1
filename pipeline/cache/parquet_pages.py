"""A look at Parquet page headers before anything is decoded.

Decoding trusts what a page says about itself: a page of a hundred bytes may promise two gigabytes. Here every
page of the columns about to be read is walked, without decompressing, and its promises are held against the
footer, whose numbers are held against fixed limits. Page headers are Thrift structures in compact encoding
(https://github.com/apache/parquet-format, ``parquet.thrift``).
"""

from __future__ import annotations

import os
from typing import Any

MAX_HEADER_BYTES = 1024
"""Ours have about 40; only statistics that nobody asked for make one longer."""

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_VALUES_FIELD = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}


def check_column_pages(file: int, column: Any, *, file_bytes: int) -> None:
    """Check that a column chunk's pages promise what the footer says, no more.

    Args:
        file: Descriptor of the file.
        column: pyarrow's ``ColumnChunkMetaData``.
        file_bytes: Size of the file.

    Raises:
        ValueError: A page lies outside its chunk, or promises more bytes or values than the footer does.
    """
    position = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < position:
        position = column.dictionary_page_offset
    end = position + column.total_compressed_size
    if not 0 < position < end <= file_bytes:
        raise ValueError("a column lies outside the file")
    bytes_left, values_left = column.total_uncompressed_size, column.num_values
    while position < end:
        header, header_bytes = read_struct(os.pread(file, min(MAX_HEADER_BYTES, end - position), position))
        kind, uncompressed, compressed = (_natural(header, field) for field in (1, 2, 3))
        values = _natural(header.get(_VALUES_FIELD.get(kind, -1), {}), 1)
        bytes_left -= header_bytes + uncompressed
        if kind == _DICTIONARY_PAGE:
            if values > uncompressed:
                raise ValueError("a dictionary page holds more values than bytes")
        else:
            values_left -= values
        position += header_bytes + compressed
        if bytes_left < 0 or values_left < 0 or position > end:
            raise ValueError("a page promises more than its column's entry in the footer")


def read_struct(data: bytes) -> tuple[dict[int, Any], int]:
    """Read one Thrift compact struct of integers, booleans, binaries and structs.

    Returns:
        Its fields by number, and the number of bytes it took.

    Raises:
        ValueError: It ends too early, nests too deep, or holds a type page headers do not use.
    """
    try:
        return _struct(data, 0, depth=4)
    except IndexError as error:
        raise ValueError("a page header ends too early") from error


def _struct(data: bytes, position: int, *, depth: int) -> tuple[dict[int, Any], int]:
    if depth == 0:
        raise ValueError("a page header nests too deep")
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            number, position = _zigzag(data, position)
        value: Any
        if kind in (1, 2):  # true, false
            value = kind == 1
        elif kind == 3:  # a byte
            value, position = data[position], position + 1
        elif kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
            value, position = _zigzag(data, position)
        elif kind == 8:  # binary: skipped
            length, position = _varint(data, position)
            value, position = None, position + length
        elif kind == 12:
            value, position = _struct(data, position, depth=depth - 1)
        else:
            raise ValueError(f"a page header holds Thrift type {kind}")
        fields[number] = value
    return fields, position + 1


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a page header holds a number of more than 64 bits")


def _zigzag(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _natural(fields: Any, number: int) -> int:
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError("a page header lacks a number it must have")
    return value

"""Thrift's compact encoding, as far as Parquet's footers and page headers use it.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

MAX_NESTING = 8

TRUE, FALSE, BYTE, INT16, INT32, INT64, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 12

Struct = dict[int, Any]
"""Field values by number: bool, int, bytes, list or another struct."""


def read_struct(data: bytes) -> tuple[Struct, int]:
    """Read the struct that the data begins with.

    Args:
        data: No value reaches beyond its end, and no count beyond its length.

    Returns:
        The struct, and the position after it.

    Raises:
        ValueError: It ends too early, nests too deep, or holds a type that is not read here.
    """
    try:
        return _struct(data, 0, MAX_NESTING)
    except IndexError as error:
        raise ValueError("a Thrift structure ends too early") from error


def read_field_head(data: bytes, position: int, number: int) -> tuple[int, int, int]:
    """Number, type and end of the next field's head after field ``number``; type 0 ends the struct.

    Raises:
        ValueError: Field numbers do not ascend.
    """
    head = data[position]
    position += 1
    if head == 0:
        return number, 0, position
    step = head >> 4
    if step == 0:
        after, position = read_integer(data, position)
        step = after - number
    if step < 1:
        raise ValueError("the fields of a Thrift structure do not ascend")
    return number + step, head & 0x0F, position


def read_list_head(data: bytes, position: int) -> tuple[int, int, int]:
    """Element type, number of elements, and the position of the first.

    Raises:
        ValueError: There are not as many bytes as elements.
    """
    head = data[position]
    position += 1
    count = head >> 4
    if count == 15:
        count, position = _varint(data, position)
    if count > len(data):
        raise ValueError("a Thrift list claims more elements than there are bytes")
    return head & 0x0F, count, position


def read_integer(data: bytes, position: int) -> tuple[int, int]:
    """A signed integer of up to 64 bits, and the position after it."""
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def read_value(data: bytes, position: int, kind: int, nesting: int = MAX_NESTING) -> tuple[Any, int]:
    """A value of the given type, and the position after it.

    Raises:
        ValueError: As :func:`read_struct`.
    """
    if INT16 <= kind <= INT64:
        return read_integer(data, position)
    if kind in (TRUE, FALSE):
        return kind == TRUE, position
    if kind == BYTE:
        return data[position], position + 1
    if kind == BINARY:
        length, position = _varint(data, position)
        if position + length > len(data):
            raise ValueError("a Thrift string ends too late")
        return data[position : position + length], position + length
    if nesting == 0:
        raise ValueError("a Thrift structure nests too deep")
    if kind == STRUCT:
        return _struct(data, position, nesting - 1)
    if kind == LIST:
        element, count, position = read_list_head(data, position)
        if element in (TRUE, FALSE):
            raise ValueError("a Thrift list of booleans")
        values = []
        for _ in range(count):
            value, position = read_value(data, position, element, nesting - 1)
            values.append(value)
        return values, position
    raise ValueError(f"Thrift type {kind}")


def _struct(data: bytes, position: int, nesting: int) -> tuple[Struct, int]:
    fields: Struct = {}
    number = 0
    while True:
        head = data[position]
        if head > 0x0F and INT16 <= head & 0x0F <= INT64 and (small := data[position + 1]) < 0x80:
            # Most fields are small integers a short step on; reading them here halves the time of a footer.
            number += head >> 4
            fields[number] = (small >> 1) ^ -(small & 1)
            position += 2
            continue
        number, kind, position = read_field_head(data, position, number)
        if kind == 0:
            return fields, position
        fields[number], position = read_value(data, position, kind, nesting)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = data[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a Thrift integer of more than 64 bits")

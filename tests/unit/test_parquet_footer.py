"""What a file claims of itself is checked before a decoder allocates for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.parquet_file import ParquetReader, parquet_bytes
from dpo_cache.pipeline.cache.parquet_footer import check_pages, read_footer
from dpo_cache.pipeline.cache.thrift_compact import read_struct
from hypothesis import given
from hypothesis import strategies as st

SCHEMA = pa.schema(
    [
        pa.field("example_key", pa.binary(32), nullable=False),
        pa.field("ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("mask", pa.list_(pa.field("element", pa.bool_(), nullable=False)), nullable=True),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


def make_table(num_rows: int = 10) -> pa.Table:
    return pa.table(
        {
            "example_key": [bytes([row]) * 32 for row in range(num_rows)],
            "ids": [[row] * 200 for row in range(num_rows)],
            "mask": [None if row % 2 else [True] for row in range(num_rows)],
            "value": [float(row) for row in range(num_rows)],
        },
        schema=SCHEMA,
    )


def our_bytes(**metadata: str) -> bytes:
    named = {f"dpo_cache.{name}": value for name, value in metadata.items()}
    return bytes(parquet_bytes([make_table()], SCHEMA, metadata=named, rows_per_group=4))


def read_all(path: Path) -> pa.Table:
    with ParquetReader(path, SCHEMA) as reader:
        return reader.read(range(len(reader.group_rows)))


def varint(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def compact(fields: dict[int, Any]) -> bytes:
    """A Thrift struct of integers, byte strings, structs (dicts) and lists of one of them, written anew."""
    out, last = b"", 0
    for number, value in sorted(fields.items()):
        kind, content = compact_value(value)
        out += bytes([(number - last) << 4 | kind]) + content
        last = number
    return out + b"\0"


def compact_value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return (1 if value else 2), b""
    if isinstance(value, int):
        return 6, varint(value)
    if isinstance(value, bytes):
        return 8, plain_varint(len(value)) + value
    if isinstance(value, dict):
        return 12, compact(value)
    kinds = [compact_value(item) for item in value]
    head = kinds[0][0] if kinds else 12
    return 9, bytes([0xF0 | head]) + plain_varint(len(value)) + b"".join(content for _, content in kinds)


def plain_varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def with_footer(content: bytes, change: Callable[[dict[int, Any]], object]) -> bytes:
    """The same file with a footer changed by hand."""
    length = int.from_bytes(content[-8:-4], "little")
    footer, _ = read_struct(content[-8 - length : -8])
    change(footer)
    changed = compact(footer)
    return content[: -8 - length] + changed + len(changed).to_bytes(4, "little") + b"PAR1"


def check(path: Path) -> None:
    """Our own checks alone, over the whole file."""
    with path.open("rb") as stream:
        footer = read_footer(stream.fileno(), file_bytes=path.stat().st_size, schema=SCHEMA)
        for chunk_of_group in footer.chunks.reshape(-1, 4):
            check_pages(stream.fileno(), chunk_of_group)


def chunk(footer: dict[int, Any], column: int, group: int = 0) -> dict[int, Any]:
    entry: dict[int, Any] = footer[4][group][1][column][3]
    return entry


LIES: dict[str, Callable[[dict[int, Any]], object]] = {
    "more rows than there are": lambda footer: footer.update({3: 10**12}),
    "a row group of a billion rows": lambda footer: footer[4][0].update({3: 10**9}),
    "a negative row group": lambda footer: footer[4][0].update({3: -1}),
    "a list of a trillion ids": lambda footer: chunk(footer, 1).update({5: 10**12}),
    "two gigabytes of one column": lambda footer: chunk(footer, 1).update({6: 2**31 - 1}),
    "a column outside the file": lambda footer: chunk(footer, 1).update({9: 10**9}),
    "a column before the file": lambda footer: chunk(footer, 1).update({9: 0}),
    "a column that overlaps the footer": lambda footer: chunk(footer, 3, 2).update({7: 10_000}),
    "another type": lambda footer: chunk(footer, 1).update({1: 6}),
    "another name": lambda footer: chunk(footer, 1).update({3: [b"other"]}),
    "another codec": lambda footer: chunk(footer, 1).update({4: 2}),
    "a dictionary": lambda footer: chunk(footer, 1).update({11: 4}),
    "statistics": lambda footer: chunk(footer, 1).update({12: {3: 0}}),
    "level histograms of another type": lambda footer: chunk(footer, 1).update({16: {2: [1, 2, 3], 3: [1, 2]}}),
    "a column in another file": lambda footer: footer[4][0][1][1].update({1: b"/etc/passwd"}),
    "a column less": lambda footer: footer[4][0][1].pop(),
    "no row groups": lambda footer: footer.update({3: 0, 4: []}),
    "encryption": lambda footer: footer.update({8: {1: {}}}),
    "metadata of others": lambda footer: footer.update({5: [{1: b"ARROW:schema", 2: b"x"}]}),
    "an optional key": lambda footer: footer[2][1].update({3: 1}),
    "a column renamed": lambda footer: footer[2][-1].update({4: b"valve"}),
    "rows without a number": lambda footer: footer.pop(3),
    "a schema of bytes": lambda footer: footer.update({2: b"schema"}),
}


def test_what_we_write_is_read_with_all_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(our_bytes(format_version="1"))
    assert read_all(path).equals(make_table())
    with ParquetReader(path, SCHEMA) as reader:
        assert reader.group_rows.tolist() == [4, 4, 2]
        assert reader.group_starts.tolist() == [0, 4, 8]
        assert reader.metadata == {"dpo_cache.format_version": "1"}
        assert reader.read([2], ["value"]).column("value").to_pylist() == [8.0, 9.0]


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_footer_is_refused(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(with_footer(our_bytes(), lambda footer: None))
    check(path)
    path.write_bytes(with_footer(our_bytes(), LIES[lie]))
    with pytest.raises(ValueError, match=r"it|a column|a row group"):
        check(path)
    with pytest.raises(DpoCacheError, match=r"a\.parquet cannot be read"):
        read_all(path)


def test_a_footer_that_takes_most_of_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(our_bytes(recorded="x" * (1 << 19)))
    check(path)
    path.write_bytes(our_bytes(recorded="x" * (1 << 21)))
    with pytest.raises(ValueError, match="claims more bytes than it may have"):
        check(path)


def page_of_ids(content: bytes) -> tuple[int, dict[int, Any], int]:
    """Where the first page of ``ids`` begins, its header, and where its payload begins."""
    length = int.from_bytes(content[-8:-4], "little")
    footer, _ = read_struct(content[-8 - length : -8])
    start = chunk(footer, 1)[9]
    header, header_bytes = read_struct(content[start : start + 256])
    return start, header, start + header_bytes


@pytest.mark.parametrize(
    "lie",
    [
        lambda header: None,
        lambda header: header.update({2: 2**31 - 1}),
        lambda header: header.update({2: header[2] - 1}),
        lambda header: header[5].update({1: 2**31 - 1}),
        lambda header: header[5].update({2: 8}),
        lambda header: header.update({1: 2}),
        lambda header: header.pop(4),
        lambda header: header.update({5: 1}),
        lambda header: header.update({3: -header[3]}),
    ],
    ids=[
        "truth",
        "bomb",
        "byte-less",
        "two-billion-values",
        "dictionary",
        "other-kind",
        "no-checksum",
        "no-page",
        "backwards",
    ],
)
def test_a_lying_page_is_refused(tmp_path: Path, lie: Callable[[dict[int, Any]], object]) -> None:
    content = our_bytes()
    start, header, payload = page_of_ids(content)
    lie(header)
    changed = compact(header)
    # The chunk's entry is kept true to the file, so that only the page's own lie is left.
    grown = len(changed) - (payload - start)

    def fit(footer: dict[int, Any]) -> None:
        for group in footer[4]:
            for column in group[1]:
                if column[3][9] > start:
                    column[3][9] += grown
        entry = chunk(footer, 1)
        entry.update({6: entry[6] + grown, 7: entry[7] + grown})

    path = tmp_path / "a.parquet"
    path.write_bytes(with_footer(content[:start] + changed + content[payload:], fit))
    if header == page_of_ids(content)[1]:
        check(path)  # nothing but the lie is refused
        return
    with pytest.raises(ValueError, match="page"):
        check(path)


def test_a_page_whose_checksum_is_right_and_whose_content_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    content = bytearray(our_bytes())
    start, header, payload = page_of_ids(bytes(content))
    content[payload + 8] ^= 0xFF
    header[4] = zlib.crc32(content[payload : payload + header[3]])
    header[4] -= (header[4] >> 31) << 32
    changed = compact(header)
    if len(changed) != payload - start:
        pytest.skip("the new checksum takes another number of bytes")
    content[start:payload] = changed
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DpoCacheError, match=r"a\.parquet cannot be read"):
        read_all(path)


def test_ordinary_parquet_of_the_same_columns_is_not_taken_for_ours(tmp_path: Path) -> None:
    for options in ({}, {"write_statistics": False}, {"use_dictionary": False, "write_page_checksum": True}):
        pq.write_table(make_table(), tmp_path / "a.parquet", **options)
        with pytest.raises(DpoCacheError, match=r"a\.parquet cannot be read"):
            read_all(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff\xff\xff\xffPAR1", b"x" * 100])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DpoCacheError, match=r"a\.parquet cannot be read"):
        read_all(tmp_path / "a.parquet")


@given(st.binary(max_size=100))
def test_any_bytes_are_a_thrift_struct_or_a_value_error(data: bytes) -> None:
    try:
        fields, end = read_struct(data)
    except ValueError:
        return
    assert 0 < end <= len(data)
    assert all(number > 0 for number in fields)

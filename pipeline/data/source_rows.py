"""The rows of a dataset by number: of a table of columns, or of JSON as it was written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

Row = dict[str, Any]
READ_ROWS = 1000
LINE = "text"
"""The column in which the datasets library gives the lines of a text file."""
_BYTE_ORDER_MARK = "\ufeff"
"""With which some editors begin a file."""
_BLANK = re.compile(rf"[\s{_BYTE_ORDER_MARK}]*")


class NoJsonRowsError(ValueError):
    """Lines that are not one JSON object each."""


class SourceRows(Protocol):
    """Rows by number. A copy sent to another process reads the same files.

    Attributes:
        num_rows: How many there are.
        column_names: What they hold.
    """

    num_rows: int
    column_names: list[str]

    def rows_with(self, column: str) -> int:
        """How many rows hold something in a column: no null and no empty list. Nothing is decoded."""
        ...

    def read(self, row_numbers: npt.NDArray[np.int64], names: Sequence[str]) -> Iterator[Row]:
        """Rows in the order given, read a thousand at a time, with these of their columns.

        Raises:
            UnicodeDecodeError: A text is not UTF-8.
        """
        ...


class TableRows:
    """Rows of a table, in which a column has one type."""

    def __init__(self, table: Dataset) -> None:
        self._table = table
        self.num_rows: int = table.num_rows
        self.column_names: list[str] = list(table.column_names)

    def rows_with(self, column: str) -> int:
        """See :class:`SourceRows`."""
        values = self._table.data.column(column)
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            return int(pc.sum(pc.greater(pc.list_value_length(values), 0)).as_py() or 0)
        return len(values) - int(values.null_count)

    def read(self, row_numbers: npt.NDArray[np.int64], names: Sequence[str]) -> Iterator[Row]:
        """See :class:`SourceRows`."""
        if not names:  # the library cannot index a table without columns
            yield from ({} for _ in row_numbers)
            return
        table = self._table.select_columns(list(names))
        for start in range(0, len(row_numbers), READ_ROWS):
            batch = table[row_numbers[start : start + READ_ROWS].tolist()]
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


class JsonRows:
    """Rows of JSON files, an object in each line, kept as text until they are read.

    A table would need one type for each field, which the library guesses from the first ten megabytes: a text that
    looks like a date, a number or JSON comes back as another one, numbers in mixed fields are rounded, and a row that
    has other keys or types further down makes the whole file unreadable.

    Args:
        lines: In a column :data:`LINE`.

    Raises:
        NoJsonRowsError: A line is something else.
    """

    def __init__(self, lines: Dataset) -> None:
        filled: Counter[str] = Counter()
        for number, line in enumerate(_texts(lines), start=1):
            for name, value in _parsed(line, number).items():
                filled[name] += value is not None and value != []
        self._lines = lines
        self._filled = filled
        self.num_rows: int = lines.num_rows
        self.column_names = list(filled)  # in the order in which they first come

    def rows_with(self, column: str) -> int:
        """See :class:`SourceRows`."""
        return self._filled[column]

    def read(self, row_numbers: npt.NDArray[np.int64], names: Sequence[str]) -> Iterator[Row]:
        """See :class:`SourceRows`; what a row does not have is null."""
        for start in range(0, len(row_numbers), READ_ROWS):
            numbers = row_numbers[start : start + READ_ROWS].tolist()
            for number, line in zip(numbers, self._lines[numbers][LINE], strict=True):
                row = _parsed(line, number + 1)
                yield {name: row.get(name) for name in names}


def one_object_a_line(lines: Dataset) -> Iterator[str]:
    """The rows of JSON files among which are arrays, objects that take several lines, or blank lines.

    From the first array on, all text is held in memory.

    Raises:
        NoJsonRowsError: They hold something else.
    """
    texts = _texts(lines)
    for number, line in enumerate(texts, start=1):
        if _BLANK.fullmatch(line):
            continue
        try:
            _parsed(line, number)
        except NoJsonRowsError as fault:
            if not _may_go_on(line):
                raise
            yield from _rows_of_values("\n".join([line, *texts]), fault)
            return
        yield line


def _texts(lines: Dataset) -> Iterator[str]:
    for chunk in lines.data.column(LINE).chunks:
        for start in range(0, len(chunk), READ_ROWS):
            yield from chunk.slice(start, READ_ROWS).to_pylist()


def _parsed(line: str, number: int) -> Row:
    try:
        row = json.loads(line.lstrip(_BYTE_ORDER_MARK))
    except (ValueError, RecursionError) as error:
        raise NoJsonRowsError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise NoJsonRowsError(f"line {number} holds a {type(row).__name__}, not an object")
    return row


def _may_go_on(line: str) -> bool:
    """Whether it is an array, or nothing is wrong with it but that it ends too early."""
    line = line.lstrip(_BYTE_ORDER_MARK).rstrip()
    try:
        return isinstance(json.loads(line), list)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        return False


def _rows_of_values(text: str, fault: NoJsonRowsError) -> Iterator[str]:
    """The objects of a text, alone or in arrays; the fault is that of its first line."""
    decoder, position = json.JSONDecoder(), 0
    while (position := _end_of_blank(text, position)) < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise fault from error
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, dict) for row in rows):
            raise NoJsonRowsError("an array holds something else than objects")
        yield from map(json.dumps, rows)


def _end_of_blank(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    assert found is not None
    return found.end()

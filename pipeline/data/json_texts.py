"""What the datasets library reads from JSON files, kept as it was written.

The library keeps a field whose values are of several types as JSON, and takes a text that is JSON for one of those
values: ``"42"`` would come back as a number, and a response in quotes without them. Where the second type comes after
the first ten megabytes, or in a later file, every text from there on would get quotes and escapes instead. Numbers in
such fields (the arguments of tools, mostly) it rounds to ten places, and some of them it reads as a neighbour with
sixteen digits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
from datasets import Value
from datasets.packaged_modules.json.json import Json as JsonFiles
from datasets.utils import json as datasets_json
from pandas.io import json as pandas_json

from .preference_format import TELLING_COLUMNS, TEMPLATE_COLUMNS

FieldPath = Sequence[str | int]
"""Keys down to a field, its column first, with 0 for the items of a list, as the library writes them."""


class LaterTypesError(ValueError):
    """A field of a JSON file has a type in later rows for which its first rows do not prepare."""


@contextmanager
def texts_as_written(builder: Any) -> Iterator[None]:
    """While this builder prepares its dataset, no text of a JSON file that is read here changes.

    Raises:
        LaterTypesError: In later rows a field is of another type, and its texts could not be kept.
    """
    if not isinstance(builder, JsonFiles):
        yield
        return
    encode, cast = datasets_json.json_encode_field, builder._cast_table
    first_paths: list[FieldPath] | None = None

    def encode_any(value: Any, path: FieldPath) -> Any:
        return encode(value, path) if path or value is None else json.dumps(value)

    def cast_prepared(table: pa.Table, json_field_paths: Sequence[FieldPath] = ()) -> pa.Table:
        nonlocal first_paths
        first_paths = list(json_field_paths) if first_paths is None else first_paths
        later_paths = [path for path in json_field_paths if path not in first_paths]
        for path in (*later_paths, *_objects_for_text(table, builder.info.features)):
            if path[0] in (*TELLING_COLUMNS, *TEMPLATE_COLUMNS):
                raise LaterTypesError(_in_words(path))
        return cast(table, json_field_paths=json_field_paths)

    datasets_json.json_encode_field, builder._cast_table = encode_any, cast_prepared
    try:
        with numbers_as_written():
            yield
    finally:
        datasets_json.json_encode_field = encode


@contextmanager
def numbers_as_written() -> Iterator[None]:
    """While the library reads or writes JSON, numbers keep their digits."""
    loads, dumps = pandas_json.ujson_loads, pandas_json.ujson_dumps
    pandas_json.ujson_loads = partial(loads, precise_float=True)
    pandas_json.ujson_dumps = partial(dumps, double_precision=15)
    try:
        yield
    finally:
        pandas_json.ujson_loads, pandas_json.ujson_dumps = loads, dumps


def _objects_for_text(table: pa.Table, features: Any) -> list[FieldPath]:
    """Columns of objects that the library would write as text, because the first rows have text there."""
    names = [field.name for field in table.schema if pa.types.is_struct(field.type)]
    return [[name] for name in names if features is not None and features.get(name) == Value("string")]


def _in_words(path: FieldPath) -> str:
    """``chosen[].content``."""
    return "".join("[]" if key == 0 else f".{key}" for key in path).removeprefix(".")

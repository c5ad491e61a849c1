"""One spelling, a seal over every bit, and nothing from a stranger that hurts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.canonical_json import (
    canonical_bytes,
    parse_object,
    read_sealed_json,
    take,
    write_sealed_json,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text().filter(lambda name: name != "sha256"), JSON_VALUES, min_size=1, max_size=5)

once_a_function = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


@once_a_function
@given(OBJECTS)
def test_what_is_written_comes_back(tmp_path: Path, value: dict[str, Any]) -> None:
    write_sealed_json(tmp_path / "a.json", value, temporary_folder=tmp_path)
    read = read_sealed_json(tmp_path / "a.json", max_bytes=1 << 20)
    assert read == value
    assert canonical_bytes(read) == canonical_bytes(value)


def test_the_seal_is_the_digest_of_the_object_without_it(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "ü"}, temporary_folder=tmp_path)
    body = b'{"a":"\\u00fc","b":[1,2.5]}'
    seal = hashlib.sha256(body).hexdigest()
    assert (tmp_path / "a.json").read_bytes() == b'{"sha256":"' + seal.encode() + b'",' + body[1:]
    assert json.loads((tmp_path / "a.json").read_text())["sha256"] == seal


def test_every_single_flipped_bit_and_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, {"name": "train", "digest": "ab" * 8, "n": 17}, temporary_folder=tmp_path)
    whole = path.read_bytes()
    damaged = [
        whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :]
        for index in range(len(whole))
        for bit in range(8)
    ]
    for content in damaged + [whole[:length] for length in range(len(whole))]:
        path.write_bytes(content)
        with pytest.raises(DpoCacheError, match="does not match its own SHA-256"):
            read_sealed_json(path, max_bytes=1000)


@once_a_function
@given(st.binary(max_size=200))
def test_whatever_is_sealed_ends_in_an_object_or_in_our_error(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.json"
    seal = hashlib.sha256(b"{" + body).hexdigest()
    path.write_bytes(b'{"sha256":"' + seal.encode() + b'",' + body)
    with contextlib.suppress(DpoCacheError):
        assert isinstance(read_sealed_json(path, max_bytes=1000), dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":1,"a":2}', "a name stands twice"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"a":"\xff"}', "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        parse_object(content, source=Path("x.json"))


def test_infinity_is_read_as_transformers_spells_it() -> None:
    assert parse_object(b'{"a":[0.0,Infinity]}', source=Path("x")) == {"a": [0.0, {"__float__": "Infinity"}]}


def test_a_file_beyond_the_limit_or_no_file_at_all_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b" " * 101)
    with pytest.raises(DpoCacheError, match="has 101 bytes"):
        read_sealed_json(tmp_path / "big", max_bytes=100)
    with pytest.raises(DpoCacheError, match="none is missing"):
        read_sealed_json(tmp_path / "none", max_bytes=100)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DpoCacheError, match="not a regular file"):
        read_sealed_json(tmp_path / "pipe", max_bytes=100)


@pytest.mark.parametrize("value", [True, -1, 2**53, 1.0, "1", None])
def test_a_whole_number_is_neither_negative_nor_huge_nor_of_another_type(value: object) -> None:
    with pytest.raises(DpoCacheError, match="'n'"):
        take({"n": value}, "n", int, source=Path("x"))
    assert take({"n": 3}, "n", int, source=Path("x")) == 3

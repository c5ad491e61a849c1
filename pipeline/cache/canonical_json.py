"""JSON that has one spelling, and carries the digest of its own bytes.

A sealed file is ``{"sha256":"<64 hex digits>",`` followed by the canonical object without its opening brace.
The digest is that of the canonical object, so it is checked on the file's bytes and needs no second
serialisation; every bit of the file is covered.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from ...errors import DpoCacheError
from .durable_file import write_durably
from .unreadable_file import read_fault

MAX_DEPTH = 32
_SEAL_START = b'{"sha256":"'
_SEAL_END = b'",'
_SEAL_BYTES = len(_SEAL_START) + 64 + len(_SEAL_END)

JsonObject = dict[str, Any]
T = TypeVar("T")


class BrokenSealError(DpoCacheError):
    """A sealed file whose bytes are not those that were written."""


def canonical_bytes(value: object) -> bytes:
    """ASCII JSON with keys sorted by code point and no spaces.

    Raises:
        ValueError: A number that is not finite, which JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def write_sealed_json(path: Path, value: JsonObject, *, temporary_folder: Path) -> None:
    """Write ``value`` durably, sealed with the SHA-256 of its canonical bytes."""
    write_durably(path, sealed_bytes(value), temporary_folder=temporary_folder)


def sealed_bytes(value: JsonObject) -> bytes:
    """The bytes of a sealed file."""
    assert value
    assert "sha256" not in value
    body = canonical_bytes(value)
    return _SEAL_START + hashlib.sha256(body).hexdigest().encode() + _SEAL_END + body[1:]


def read_sealed_json(path: Path, *, max_bytes: int) -> JsonObject:
    """Read a sealed file and check its seal.

    Args:
        path: The file.
        max_bytes: A larger file is refused unread.

    Raises:
        DpoCacheError: The file is missing, too large, damaged (:class:`BrokenSealError`), or not a sealed JSON object.
    """
    content = read_bounded(path, max_bytes=max_bytes)
    body = b"{" + content[_SEAL_BYTES:]
    seal = _SEAL_START + hashlib.sha256(body).hexdigest().encode() + _SEAL_END
    if content[:_SEAL_BYTES] != seal:
        raise BrokenSealError(
            f"{path} is damaged: its content does not match its own SHA-256",
            next_step="restore it from a copy, or build again",
        )
    return parse_object(body, source=path)


def parse_object(content: bytes, *, source: Path) -> JsonObject:
    """Parse a JSON object from anyone: bounded depth, no duplicate names.

    Non-finite numbers, which some model configurations spell ``Infinity``, come back as
    ``{"__float__": "Infinity"}``, the spelling transformers itself writes.

    Raises:
        DpoCacheError: Not such an object.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=lambda name: {"__float__": name},
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise DpoCacheError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DpoCacheError(f"{source} holds a JSON {type(value).__name__}", expected="a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise DpoCacheError(f"{source} nests JSON deeper than {MAX_DEPTH} levels")
    return value


def take(value: JsonObject, name: str, kind: type[T], *, source: Path) -> T:
    """A member of an object, which must be there and of the JSON type that ``kind`` stands for.

    Raises:
        DpoCacheError: It is not. Whole numbers must lie in [0, 2**53).
    """
    found = value.get(name)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise DpoCacheError(f"{source}: {name!r} is not what it must be", expected=f"a JSON {kind.__name__}")
    if isinstance(found, int) and not 0 <= found < 1 << 53:
        raise DpoCacheError(f"{source}: {name!r} is out of range", expected="0 or more, below 2**53")
    return found


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """The whole of a regular file.

    Raises:
        DpoCacheError: It is missing, special, too large or (:class:`~.unreadable_file.UnreadableFileError`) cannot be
            read now.
    """
    try:
        # Not blocking: a pipe in the place of a file must not hang the reader.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DpoCacheError(f"{path} is not a regular file")
            if status.st_size > max_bytes:
                raise DpoCacheError(f"{path} has {status.st_size} bytes", expected=f"at most {max_bytes}")
            return stream.read(max_bytes)
    except FileNotFoundError as error:
        raise DpoCacheError(f"{path} is missing") from error
    except (OSError, MemoryError) as error:
        raise read_fault(path, error) from error


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> JsonObject:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return value


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth

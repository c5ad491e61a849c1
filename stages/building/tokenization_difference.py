"""Where the ways in which two mixtures made their tokens differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differing_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields of two tokenizations that decide about ids, with both values; library versions and paths do not."""
    ours, theirs = dict(_deciding_fields(ours)), dict(_deciding_fields(theirs))
    names = sorted(ours.keys() | theirs.keys())
    return [(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]


def settings_in_words(differing: list[tuple[str, Any, Any]]) -> str:
    """Differing fields for a message."""
    return "; ".join(f"{name} (was {_short(was)}, now {_short(now)})" for name, was, now in differing)


def _deciding_fields(tokenization: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    settings = tokenization.get("settings") or {}
    yield from ((name, settings.get(name)) for name in ("max_seq_length", "truncation", "mask"))
    for name in ("chat_template", "tool_chat_template"):
        yield name, (tokenization.get(name) or {}).get("sha256")
    yield "tokenizer", tokenization.get("tokenizer_sha256") or tokenization.get("vocabulary_sha256")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 24 else text

"""Strangers' text as it may be shown to people."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without control characters: neither a terminal nor the direction of a line is a stranger's to steer."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)

"""Strangers' text as it may be shown to people."""

from __future__ import annotations

import unicodedata

_HARMLESS = "\n\t\u200c\u200d"
"""Line feed, tab, and the two joiners, without which Persian words and many emoji fall apart."""


def printable(text: str) -> str:
    """Without control characters: neither a terminal nor the direction of a line is a stranger's to steer.

    Spaces of any width stay.
    """
    return "".join(letter if _is_text(letter) else "�" for letter in text)


def one_line(text: str) -> str:
    """The same within a line, which a stranger's text must not end to go on in words that seem ours."""
    return printable(text).replace("\n", " ")


def _is_text(letter: str) -> bool:
    return letter.isprintable() or letter in _HARMLESS or unicodedata.category(letter) == "Zs"

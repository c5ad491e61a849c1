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


def _is_text(letter: str) -> bool:
    return letter.isprintable() or letter in _HARMLESS or unicodedata.category(letter) == "Zs"

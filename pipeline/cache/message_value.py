"""Values as messages quote them: a message with two whole digests is hard to read."""

from __future__ import annotations

import re

_DIGEST = re.compile(r"[0-9a-f]{64}")
DIGITS = 12


def message_value(value: object) -> str:
    """``repr``; of a SHA-256 in hex the first digits, which are enough to tell two apart."""
    return f"'{value[:DIGITS]}…'" if isinstance(value, str) and _DIGEST.fullmatch(value) else repr(value)

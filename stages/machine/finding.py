"""One thing that ``dpo-cache doctor`` looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing is wrong."""
    WARNING = "warning"
    """Something is slow, missing or will fail where it is asked for."""
    FATAL = "fatal"
    """``dpo-cache build`` or ``dpo-train`` cannot run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do about it.

    Attributes:
        section: What it belongs to, such as ``software``.
        name: What was looked at.
        value: What was found; never a token.
        level: How bad it is.
        advice: What to do, where there is something to do.
    """

    section: str
    name: str
    value: str
    level: Level = Level.OK
    advice: str | None = None

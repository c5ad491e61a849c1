"""What a person sees of what was written to a terminal."""

from __future__ import annotations

import io


class TerminalText(io.StringIO):
    """A terminal, as far as a program can ask."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines on it; after a carriage return what follows is written over what stands there."""
    return [_overwritten(line) for line in written.replace("\r\n", "\n").split("\n")]


def _overwritten(line: str) -> str:
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()

"""Words for the person at the terminal, while work goes on."""

from __future__ import annotations

import sys

from tqdm import tqdm

from ...pipeline.data.printable_text import printable


def say(message: str) -> None:
    """Print a line to stderr, above a bar that stands there: stdout is for what a command was asked for."""
    tqdm.write(printable(message), file=sys.stderr)  # it may quote a cache that a stranger made

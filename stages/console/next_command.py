"""Closing lines: what to type next."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ...errors import as_argument

USUAL_MIXTURE = "train"
"""The one that a build makes and a training reads where neither names another."""


def training_commands(cache: Path | str, mixtures: Collection[str]) -> str:
    """How to train on the one of these mixtures that is for training; where only its maker knows, how to use it.

    Args:
        cache: Where they are.
        mixtures: Their names.
    """
    if USUAL_MIXTURE in mixtures:
        return f"next: dpo-train --cache {as_argument(cache)} --mixture {USUAL_MIXTURE} --output runs/first"
    first = next(iter(mixtures))
    return (
        f"next, to train on {first}: dpo-train --cache {as_argument(cache)} --mixture {first} --output runs/first\n"
        f"or, to evaluate on it: dpo-train --cache {as_argument(cache)} --eval-mixture {first} --output runs/first"
    )


def report_command(output: str) -> str:
    """How to see the results of the run, or of the sweep, in this folder."""
    page = Path(output) / "report.html"
    return f"next: dpo-report {as_argument(output)} -o {as_argument(page)}"

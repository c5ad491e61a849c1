"""The small files of a run's folder: each is there as a whole or as it was before, whatever is killed meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError, first_line
from ..cache.durable_file import write_durably
from ..finite_json import finite_json


def write_run_file(path: Path, text: str) -> None:
    """Write a file of a run; one that is there already is replaced as a whole.

    Raises:
        DpoCacheError: The operating system refused (no space, no permission, an I/O error).
    """
    write_durably(path, text.encode("utf-8"), temporary_folder=path.parent)


def write_run_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as :func:`write_run_file` does; a number that is not finite is null."""
    write_run_file(path, finite_json(value, indent=2) + "\n")


def read_run_json(path: Path) -> dict[str, Any]:
    """Read an object that :func:`write_run_json` wrote.

    Raises:
        DpoCacheError: The file cannot be read, or has been changed by something else: a run never leaves half of it.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
    else:
        if isinstance(value, dict):
            return value
        reason = f"it holds a JSON {type(value).__name__}"
    raise DpoCacheError(
        f"{path} cannot be read: {reason}",
        expected="the JSON object that was written there",
        next_step="restore it from a copy, or remove it",
    )

"""The small files of a run's folder: each is there as a whole or as it was before, whatever is killed meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

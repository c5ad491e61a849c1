"""What a card may call a model or a dataset: no path of a machine."""

from __future__ import annotations

from pathlib import Path


def public_name(path_or_id: str) -> str:
    """A Hub id as it is; of a folder, its name alone."""
    path = Path(path_or_id).expanduser()
    return path.name if path.is_absolute() or path.exists() or path_or_id.startswith(".") else path_or_id

"""What a card may call a model or a dataset: no path of a machine."""

from __future__ import annotations

import os

from ...pipeline.data.named_path import named_path


def public_name(path_or_id: str) -> str:
    """A Hub id as it is; of a folder, its name alone."""
    path = named_path(path_or_id)
    return path.name if path.is_absolute() or os.path.exists(path) or path_or_id.startswith((".", "~")) else path_or_id

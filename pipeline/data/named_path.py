"""Paths as people, and strangers' caches, name them."""

from __future__ import annotations

import os
from pathlib import Path


def named_path(text: str | Path) -> Path:
    """A path with its tilde resolved; where there is no such user it stays as it is, and is not found."""
    return Path(os.path.expanduser(text))

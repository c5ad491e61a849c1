"""The folder in which this package keeps what it can fetch or compute again, one per user."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import DpoCacheError


def user_folder() -> Path:
    """``dpo-cache`` in the user's cache folder; it may not exist yet.

    Raises:
        DpoCacheError: The user has no home, as in a container that runs under a number without a name.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as homeless:
        raise DpoCacheError(
            f"the user {os.getuid()} has no home folder, and HOME is not set",
            next_step="set XDG_CACHE_HOME to a folder that this user may write to",
        ) from homeless
    return Path(base) / "dpo-cache"

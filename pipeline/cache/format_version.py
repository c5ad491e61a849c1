"""The version of the cache format, which each of its files states."""

from __future__ import annotations

from pathlib import Path

from ...errors import DpoCacheError

FORMAT_VERSION = 1


def require_format_version(found: object, source: Path) -> None:
    """Refuse a file of another version before anything else in it is believed.

    Raises:
        DpoCacheError: It is of another version, or states none.
    """
    if found != FORMAT_VERSION:
        raise DpoCacheError(
            f"{source} has format version {str(found)[:20]}",
            expected=f"version {FORMAT_VERSION}",
            next_step="use the dpo-cache that wrote it, or build again in another folder",
        )

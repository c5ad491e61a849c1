"""The version of the cache format, which each of its files states."""

from __future__ import annotations

from pathlib import Path

from .unreadable_file import UnreadableFileError

FORMAT_VERSION = 1


class OtherVersionError(UnreadableFileError):
    """A file of another version of the format: whole, for all that we know, and not ours to replace or remove."""


def require_format_version(found: object, source: Path) -> None:
    """Refuse a file of another version before anything else in it is believed.

    Raises:
        OtherVersionError: It is of another version, or states none.
    """
    if found != FORMAT_VERSION:
        raise other_version(f"{source} has format version {str(found)[:20]}", expected=f"version {FORMAT_VERSION}")


def other_version(found: str, *, expected: str) -> OtherVersionError:
    """The error for a file that only another version of dpo-cache can read."""
    return OtherVersionError(
        found, expected=expected, next_step="use the dpo-cache that wrote it, or build again in another folder"
    )

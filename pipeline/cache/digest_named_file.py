"""Files named by the SHA-256 of their bytes: shards and tables. One that is there and whole is never written again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...errors import DpoCacheError
from .durable_file import Bytes, settle_folder, write_durably
from .parquet_file import file_sha256
from .unreadable_file import UnreadableFileError


def write_digest_named(path: Path, content: Bytes | Iterable[Bytes], *, temporary_folder: Path) -> bool:
    """Write a file under its digest, unless it stands there already: a training may be reading it.

    Args:
        path: In the folder where it becomes visible, under the digest of its bytes.
        content: The bytes, or chunks of them.
        temporary_folder: On the same file system.

    Returns:
        Whether it was written.

    Raises:
        DpoCacheError: The operating system refused.
    """
    if holds_its_digest(path):
        settle_folder(path.parent)  # whoever wrote it may not have come to that
        return False
    write_durably(path, content, temporary_folder=temporary_folder)
    return True


def holds_its_digest(path: Path) -> bool:
    """Whether a file is there, with the bytes that its name promises."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return file_sha256(path) == path.stem
    except UnreadableFileError:
        raise
    except DpoCacheError:
        return False

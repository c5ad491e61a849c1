"""A file that could not be read, which says nothing about its bytes: no reason to take it for damaged."""

from __future__ import annotations

import errno
from pathlib import Path

from ...errors import DpoCacheError, as_argument, first_line

_NOT_A_FILE = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
"""Something else stands in its place: that does not pass."""


class UnreadableFileError(DpoCacheError):
    """The system would not or could not read a file (a disk, a network, too little memory, a lack of rights), or this
    version of dpo-cache cannot.
    """


def read_fault(path: Path, error: OSError | MemoryError) -> DpoCacheError:
    """What it means that reading ``path`` failed so.

    Returns:
        An :class:`UnreadableFileError` where another attempt could end better.
    """
    if isinstance(error, FileNotFoundError):
        return DpoCacheError(f"{path} is missing", next_step="restore it from a copy, or build again")
    if isinstance(error, OSError) and (error.errno is None or error.errno in _NOT_A_FILE):
        return DpoCacheError(  # without a number it is not the system that speaks, but a decoder
            f"{path} cannot be read: {error.strerror or first_line(error)}",
            next_step=f"find all damage with: dpo-cache verify {as_argument(path.parent.parent)}",
        )
    reason = error.strerror if isinstance(error, OSError) else "there is not enough memory"
    return UnreadableFileError(
        f"{path} could not be read: {reason}",
        expected="a file that can be read; nothing says that it is damaged",
        next_step="try again; if it stays so, look at the disk, its rights and the memory (dmesg, ls -l, free -h)",
    )

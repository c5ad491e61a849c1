"""What is said to people must not end the work: standard error that takes every line, whether or not anyone reads it.

A terminal goes away, ``tee`` dies of the Ctrl-C that a training is to save after, the disk of a log file fills up.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDERR = 2


class _UnfailingFile(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int:
        """As much as is taken; all of it where nothing can be written, or where it could only be waited for."""
        size = memoryview(data).nbytes
        try:
            written: int | None = super().write(data)
        except OSError:
            return size
        return size if written is None else written


def make_stderr_unfailing() -> None:
    """From now on nothing that this process says can fail; a stream that is closed is opened to nowhere."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        # Otherwise a shard would be opened under the number of standard error, and get what C libraries print.
        while (file := os.open(os.devnull, os.O_RDWR)) <= STDERR:
            pass
        os.close(file)
    if sys.stderr is sys.__stderr__:  # else somebody has put a stream of their own in its place
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_UnfailingFile(STDERR, "w", closefd=False)),
            encoding=sys.stderr.encoding if sys.stderr else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )

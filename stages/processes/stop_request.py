"""Being asked to stop, by Ctrl-C or SIGTERM, as a question that the work asks when it suits it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STDERR = 2


@contextlib.contextmanager
def stop_requests(*, notice: str | None = None) -> Iterator[Callable[[], bool]]:
    """While this is held, the first SIGINT or SIGTERM only answers the question; a second one takes effect at once.

    Args:
        notice: Told to the person at the terminal at the first one, as the answer may take a while.
    """
    requested: list[int] = []

    def remember(signum: int, _frame: FrameType | None) -> None:
        if requested:
            raise KeyboardInterrupt
        requested.append(signum)
        if notice is not None:  # not through a stream, which the signal may have interrupted in the middle of a line
            os.write(STDERR, f"\n{notice}\n".encode())

    previous = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

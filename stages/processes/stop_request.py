"""Being asked to stop, by Ctrl-C, SIGTERM or a lost terminal, as a question that the work asks when it suits it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STDERR = 2


@contextlib.contextmanager
def stop_requests(*, notice: str | None = None) -> Iterator[Callable[[], bool]]:
    """While this is held, the first SIGINT, SIGTERM or SIGHUP only answers the question; a later SIGINT takes effect at
    once.

    The others do not. Kernel and shell each send a SIGHUP when a terminal goes away. Where a scheduler or systemd sends
    a SIGTERM to all processes of a job, a rank gets a second from the process that started it and passes on its own.

    Args:
        notice: Told to the person at the terminal at the first one, as the answer may take a while.
    """
    requested: list[int] = []

    def remember(signum: int, _frame: FrameType | None) -> None:
        if requested:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        requested.append(signum)
        if notice is not None:  # not through a stream, which the signal may have interrupted in the middle of a line
            with contextlib.suppress(OSError):  # the same Ctrl-C ended the `tee` that this goes to
                os.write(STDERR, f"\n{notice}\n".encode())

    with handled_by(remember, signals_to_stop()):
        yield lambda: bool(requested)


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """While this is held, a request to stop ends the process: for a wait in a library in which Python hears of none."""
    with handled_by(signal.SIG_DFL, signals_to_stop()):
        yield


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, signals: Iterable[signal.Signals]
) -> Iterator[None]:
    """Let a handler have these signals while this is held; in another thread than the main one Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


def signals_to_stop() -> list[signal.Signals]:
    """What asks to stop; a lost terminal does not where ``nohup`` says so."""
    signals = [signal.SIGINT, signal.SIGTERM]
    return signals if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*signals, signal.SIGHUP]

"""Threads beside the one that drives the device: read ahead of it, write behind it.

A fault in either thread is raised in the driving one, at its next turn. Both hold a bounded number of items.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")

READ_AHEAD = 2
POLL_S = 0.2


class ReadAhead(Generic[Item]):
    """An iterable, consumed in a thread, a few items ahead of whoever iterates this.

    Args:
        items: Consumed in the thread.
        on_stop: Called on leaving: it makes ``items`` end if they wait for something.
    """

    def __init__(self, items: Iterable[Item], *, on_stop: Callable[[], None] = lambda: None) -> None:
        self._items = items
        self._on_stop = on_stop
        self._waiting: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._on_stop()
        self._thread.join()

    def _taken(self) -> Iterator[Item]:
        while (taken := self._next()) is not None:
            if isinstance(taken, BaseException):
                raise taken
            yield taken[0]

    def _next(self) -> tuple[Item] | BaseException | None:
        """What was read next; waits for it."""
        return self._waiting.get()

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put((item,)):
                    return
            self._put(None)
        except BaseException as fault:
            self._put(fault)

    def _put(self, item: tuple[Item] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._waiting.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False


class WriteBehind:
    """Run jobs one after another in a thread; handing over the next one waits for the last.

    Args:
        on_fault: Called in the thread when a job fails: whoever waits for something else is to wake up.
    """

    def __init__(self, *, on_fault: Callable[[], None] = lambda: None) -> None:
        self._on_fault = on_fault
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")
        self._in_flight: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start ``job`` once the one before has ended; raises what that one raised."""
        self._wait()
        self._in_flight = self._pool.submit(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException:
            self._on_fault()
            raise

    def _wait(self) -> None:
        if self._in_flight is not None:
            job, self._in_flight = self._in_flight, None
            job.result()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last job; its fault is raised unless another one is on its way."""
        self._pool.shutdown(wait=True)
        if kind is None:
            self._wait()

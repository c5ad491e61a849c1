"""Who of a job is alive: every process beats in the store, and others judge by their own clock alone."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, replace

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

HEARTBEAT_S = 1.0
STALE_AFTER_S = 15.0


class Heartbeat:
    """Beat in the store from a thread of its own: a long forward pass must not look like death.

    Args:
        store: A connection that only this heart uses.
        name: What the others call it.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._key = f"heartbeats/{name}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._store.add(self._key, 1)
            except DistError:
                return  # the store is gone; the main thread will notice and say so


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A heart as it was seen last: its beats, when they became so many, and when it was looked at."""

    beats: int
    since: float
    looked: float


class HeartMonitor:
    """How long the hearts of others have stood still, since this process first looked.

    A heart's silence counts only while this process looks: a job that its cluster suspends, or whose terminal does,
    stands still as a whole, and its processes do not wake up in the same moment.

    Args:
        store: Where they beat.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, _Seen] = {}

    def has_stopped(self, name: str, *, patience: float = 1.0, starting_s: float = 0.0) -> bool:
        """Whether a heart stands still for good, or was declared dead.

        Args:
            name: Whose heart.
            patience: How many times :data:`STALE_AFTER_S` it may stand still.
            starting_s: How long it may take until its first beat, where that is longer.
        """
        if self._store.check([f"dead/{name}"]):
            return True
        beats, now = self._store.add(f"heartbeats/{name}", 0), time.monotonic()
        seen = self._seen.get(name)
        if seen is None or beats != seen.beats or now - seen.looked > STALE_AFTER_S:
            self._seen[name] = _Seen(beats=beats, since=now, looked=now)
            return False
        self._seen[name] = replace(seen, looked=now)
        patience_s = patience * STALE_AFTER_S
        return now - seen.since > (patience_s if beats else max(patience_s, starting_s))

    def has_begun(self, name: str) -> bool:
        """Whether a heart had beaten when :meth:`has_stopped` last looked."""
        return name in self._seen and self._seen[name].beats > 0

    def declare_dead(self, name: str) -> None:
        """Say that a process has ended: nobody needs to wait for its heart."""
        self._store.set(f"dead/{name}", "")


def process_name(pid: int) -> str:
    """What a process of this machine is called among those of the build."""
    return f"{socket.gethostname()}-{pid}"

"""Who scores which unit: claims with a heartbeat in the launcher's key-value store.

Workers draw unit numbers from a shared counter, so a slow one holds nobody up, and no collective is needed. When
the counter runs out, an idle worker takes over units whose owner's heart has stopped. Should that owner have been
slow rather than dead, both write the same rows and readers keep one: a race costs time, never a row.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from torch._C._distributed_c10d import Store

from .heartbeat import HeartMonitor, process_name

IDLE_POLL_S = 0.25


class UnitQueue:
    """The units of one build, seen by one of its processes.

    Args:
        store: The store of this job; only this process uses this connection.
        num_units: How many units the build has.
    """

    def __init__(self, store: Store, num_units: int) -> None:
        self.num_units = num_units
        self._store = store
        self._owner = process_name(os.getpid())
        self._hearts = HeartMonitor(store)
        self._stopped = threading.Event()

    def units(self, *, take_over: bool = True) -> Iterator[int]:
        """Yield the units this process is to score, until all units of the build are done.

        Args:
            take_over: Wait for the units of others and score those that a dead process left; else end when none is
                left to draw.

        Yields:
            A unit's number; it is marked done by :meth:`finish`.
        """
        while not self._stopped.is_set() and (unit := self._store.add("units/drawn", 1) - 1) < self.num_units:
            self._store.set(f"units/{unit}/owner", self._owner)
            yield unit
        if take_over:
            yield from self._abandoned_units()

    def stop(self) -> None:
        """Let :meth:`units` end soon; the one method that another thread may call."""
        self._stopped.set()

    def declare_dead(self, process: str) -> None:
        """Say that a process (:func:`~.heartbeat.process_name`) has ended: its units need not wait for its heart."""
        self._hearts.declare_dead(process)

    def finish(self, unit: int, shard: str | None = None) -> None:
        """Mark a unit done: the shard of this name, if it came to one, is durable."""
        if shard is not None:
            self._store.set(f"units/{unit}/shard", shard)
        if self._store.add(f"units/{unit}/done", 1) == 1:
            self._store.add("units/done", 1)

    @property
    def num_finished(self) -> int:
        """Units done by all processes together."""
        return self._store.add("units/done", 0)

    def finished_shards(self) -> list[str]:
        """Names of the shards that finished units came to."""
        keys = [f"units/{unit}/shard" for unit in range(self.num_units)]
        return [self._store.get(key).decode() for key in keys if self._store.check([key])]

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter of the build that all processes share; the new value."""
        return self._store.add(f"counters/{counter}", amount)

    def report_nonfinite(self, keys: list[bytes]) -> None:
        """Name pairs whose log-probability is not a finite negative number."""
        for key in keys:
            self._store.set(f"nonfinite/{self.add('nonfinite', 1) - 1}", key.hex())

    def report_faults(self, faults: list[str]) -> None:
        """Tell the leading process what went wrong elsewhere."""
        for fault in faults:
            self._store.set(f"fault/{self.add('faults', 1) - 1}", fault)

    def faults(self) -> list[str]:
        """All that :meth:`report_faults` told, in any process."""
        return [self._store.get(f"fault/{n}").decode() for n in range(self.add("faults", 0))]

    def nonfinite_keys(self) -> list[bytes]:
        """All pairs that :meth:`report_nonfinite` named, in any process."""
        count = self.add("nonfinite", 0)
        return sorted({bytes.fromhex(self._store.get(f"nonfinite/{n}").decode()) for n in range(count)})

    def _abandoned_units(self) -> Iterator[int]:
        """Wait until every unit is done, taking over those whose owner's heart has stopped."""
        while self.num_finished < self.num_units and not self._stopped.is_set():
            for unit in range(self.num_units):
                if self._store.add(f"units/{unit}/done", 0):
                    continue
                owner = self._owner_of(unit)
                if self._hearts.has_stopped(owner) and self._take_over(unit, owner):
                    yield unit
            self._stopped.wait(IDLE_POLL_S)

    def _owner_of(self, unit: int) -> str:
        """The last process that claimed the unit; one that died between drawing and claiming has no name."""
        if not self._store.check([f"units/{unit}/owner"]):
            return f"nobody-yet-{unit}"
        return self._store.get(f"units/{unit}/owner").decode()

    def _take_over(self, unit: int, dead_owner: str) -> bool:
        if self._store.add(f"units/{unit}/taken-from/{dead_owner}", 1) != 1:
            return False  # another idle worker was quicker
        self._store.set(f"units/{unit}/owner", self._owner)
        return True

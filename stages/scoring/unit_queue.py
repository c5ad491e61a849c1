"""Who scores which unit: claims with a heartbeat in the launcher's key-value store.

Workers draw unit numbers from a shared counter, so a slow one holds nobody up, and no collective is needed. When
the counter runs out, an idle worker takes over units whose owner's heart has stopped. Should that owner have been
slow rather than dead, both write the same rows and readers keep one: a race costs time, never a row.

Each step is a single call to the store, so that there is no moment between two calls in which a worker could die and
leave a unit that nobody finishes: what is done is told by the units' own keys, and whoever takes a unit over puts its
own name, with its own heart, in the place of the dead one's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict

from torch._C._distributed_c10d import Store

from ..building.left_out import UnusablePair
from ..processes.heartbeat import HeartMonitor

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
        self._hearts = HeartMonitor(store)
        self._stopped = threading.Event()
        self._num_drawn = 0
        self._unfinished: list[int] = []
        """Of the units drawn so far, those that were not done when last looked at."""

    def units(self, owner: str, *, take_over: bool = True) -> Iterator[int]:
        """Yield the units this process is to score, until all units of the build are done.

        Args:
            owner: This process, by the name of its :class:`~..processes.heartbeat.Heartbeat`.
            take_over: Wait for the units of others and score those that a dead process left; else end when none is
                left to draw.

        Yields:
            A unit's number; it is marked done by :meth:`finish`.
        """
        while not self._stopped.is_set() and (unit := self._store.add("units/drawn", 1) - 1) < self.num_units:
            if self._claim(unit, owner, from_owner=""):  # else somebody thought us dead since we drew it
                yield unit
        if take_over:
            yield from self._abandoned_units(owner)

    def stop(self) -> None:
        """Let :meth:`units` end soon; the one method that another thread may call."""
        self._stopped.set()

    def declare_dead(self, process: str) -> None:
        """Say that a process (:func:`~.heartbeat.process_name`) has ended: its units need not wait for its heart."""
        self._hearts.declare_dead(process)

    def finish(self, unit: int, shard: str = "") -> None:
        """Mark a unit done: its shard of this name is durable; no name if all of its pairs were refused."""
        self._store.set(f"units/{unit}/done", shard)

    @property
    def num_finished(self) -> int:
        """Units done by all processes together."""
        return self._look() - len(self._unfinished)

    def finished_shards(self) -> list[str]:
        """Names of the shards of finished units."""
        keys = [f"units/{unit}/done" for unit in range(self.num_units)]
        names = [self._store.get(key).decode() for key in keys if self._store.check([key])]
        return [name for name in names if name]

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter of the build that all processes share; the new value."""
        return self._store.add(f"counters/{counter}", amount)

    def report_unusable(self, pairs: list[UnusablePair]) -> None:
        """Name pairs whose log-probability is refused."""
        for pair in pairs:
            self._store.set(f"unusable/{self.add('unusable', 1) - 1}", json.dumps(asdict(pair)))

    def report_faults(self, faults: list[str]) -> None:
        """Tell the leading process what went wrong elsewhere."""
        for fault in faults:
            self._store.set(f"fault/{self.add('faults', 1) - 1}", fault)

    def faults(self) -> list[str]:
        """All that :meth:`report_faults` told, in any process."""
        return [self._store.get(f"fault/{n}").decode() for n in range(self.add("faults", 0))]

    def unusable_pairs(self) -> list[UnusablePair]:
        """All pairs that :meth:`report_unusable` named, in any process, each once and by key."""
        told = [json.loads(self._store.get(f"unusable/{n}").decode()) for n in range(self.add("unusable", 0))]
        return [UnusablePair(**by_key) for _, by_key in sorted({pair["key"]: pair for pair in told}.items())]

    def _abandoned_units(self, owner: str) -> Iterator[int]:
        """Wait until every unit is done, taking over those whose owner's heart has stopped."""
        while self.num_finished < self.num_units and not self._stopped.is_set():
            for unit in list(self._unfinished):
                last_owner = self._owner_of(unit)
                if not self._hearts.has_stopped(last_owner or f"nobody-yet-{unit}"):
                    continue
                if self._claim(unit, owner, from_owner=last_owner):
                    yield unit
            self._stopped.wait(IDLE_POLL_S)

    def _look(self) -> int:
        """Update which drawn units are unfinished; returns how many have been drawn."""
        drawn = min(self._store.add("units/drawn", 0), self.num_units)
        self._unfinished += range(self._num_drawn, drawn)
        self._num_drawn = drawn
        self._unfinished = [unit for unit in self._unfinished if not self._store.check([f"units/{unit}/done"])]
        return drawn

    def _owner_of(self, unit: int) -> str:
        """The last process that claimed the unit; empty where one died between drawing and claiming."""
        key = f"units/{unit}/owner"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _claim(self, unit: int, owner: str, *, from_owner: str) -> bool:
        """Make ``owner`` the unit's owner in place of ``from_owner``; False where another process was quicker."""
        owner_now: bytes = self._store.compare_set(f"units/{unit}/owner", from_owner, owner)
        return owner_now.decode() == owner

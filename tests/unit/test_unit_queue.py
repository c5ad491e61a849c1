"""Every unit is scored, by whoever is alive to do it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from dpo_cache.stages.building.left_out import UnusablePair
from dpo_cache.stages.processes import heartbeat
from dpo_cache.stages.scoring import unit_queue
from dpo_cache.stages.scoring.unit_queue import UnitQueue
from torch._C._distributed_c10d import HashStore


def drain(queue: UnitQueue, owner: str = "worker") -> list[int]:
    done = []
    for unit in queue.units(owner):
        queue.finish(unit)
        done.append(unit)
    return done


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 0.2)
    monkeypatch.setattr(unit_queue, "IDLE_POLL_S", 0.02)


def test_one_worker_gets_every_unit_once() -> None:
    assert drain(UnitQueue(HashStore(), 7)) == list(range(7))


def test_two_workers_share_the_units() -> None:
    store = HashStore()
    first, second = UnitQueue(store, 4).units("first"), UnitQueue(store, 4).units("second")
    assert [next(first), next(second), next(first), next(second)] == [0, 1, 2, 3]


def test_the_unit_of_a_worker_whose_heart_stopped_is_taken_over() -> None:
    store = HashStore()
    assert next(UnitQueue(store, 3).units("dead")) == 0
    survivor = UnitQueue(store, 3)
    assert drain(survivor) == [1, 2, 0]
    assert survivor.num_finished == 3


def test_a_unit_drawn_by_a_worker_that_died_before_claiming_it_is_not_lost() -> None:
    store = HashStore()
    store.add("units/drawn", 1)
    assert drain(UnitQueue(store, 2)) == [1, 0]


def test_a_unit_finished_twice_counts_once() -> None:
    queue = UnitQueue(HashStore(), 2)
    assert next(queue.units("worker")) == 0
    queue.finish(0)
    queue.finish(0)
    assert queue.num_finished == 1


def test_the_shards_of_finished_units_are_told_by_name() -> None:
    """A unit all of whose pairs are unusable has none; of two for one unit the later is named, and both are there."""
    store = HashStore()
    UnitQueue(store, 3).finish(0, "a.parquet")
    UnitQueue(store, 3).finish(1)
    UnitQueue(store, 3).finish(2, "b.parquet")
    UnitQueue(store, 3).finish(2, "c.parquet")
    assert UnitQueue(store, 3).finished_shards() == ["a.parquet", "c.parquet"]


def test_refused_pairs_named_by_any_worker_are_told_once_each_with_their_values() -> None:
    store = HashStore()
    one, other = (
        UnusablePair(key=digit * 64, reason="no-finite-logps", chosen=float("-inf"), rejected=-1.5) for digit in "12"
    )
    UnitQueue(store, 1).report_unusable([other, one])
    UnitQueue(store, 1).report_unusable([one])
    assert UnitQueue(store, 1).unusable_pairs() == [one, other]


class _DeadError(Exception):
    """What stands for SIGKILL."""


class _MortalStore:
    """A store whose user dies before its next call, after so many."""

    def __init__(self, store: HashStore, calls: int) -> None:
        self._store = store
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self._calls == 0:
                raise _DeadError
            self._calls -= 1
            return getattr(self._store, name)(*arguments)

        return call


@pytest.mark.parametrize("calls", range(40))
def test_a_worker_may_die_between_any_two_calls_to_the_store(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws and finishes units, then takes over one that a dead process left; the survivor finishes the rest."""
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 3600.0)
    store = HashStore()
    assert next(UnitQueue(store, 4).units("dead long ago")) == 0
    mortal = UnitQueue(cast(HashStore, _MortalStore(store, calls)), 4)
    survivor = UnitQueue(store, 4)
    for name in ("dead long ago", "mortal", *(f"nobody-yet-{unit}" for unit in range(4))):
        survivor.declare_dead(name)
    with suppress(_DeadError):
        drain(mortal, "mortal")
    done = drain(survivor)
    assert survivor.num_finished == 4
    assert len(done) == len(set(done))


class _HeldUpStore:
    """A store whose user is held up before it claims the unit that it drew."""

    def __init__(self, store: HashStore, meanwhile: Callable[[], object]) -> None:
        self._store = store
        self._meanwhile = meanwhile

    def __getattr__(self, name: str) -> Any:
        if name == "compare_set":
            self._meanwhile()
        return getattr(self._store, name)


def test_a_unit_that_was_taken_over_before_its_drawer_claimed_it_is_left_to_its_new_owner() -> None:
    store = HashStore()
    quick = UnitQueue(store, 1)
    slow = UnitQueue(cast(HashStore, _HeldUpStore(store, lambda: drain(quick, "quick"))), 1)
    assert drain(slow, "slow") == []
    assert slow.num_finished == 1


def test_the_unit_of_a_worker_declared_dead_is_taken_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 3600.0)
    store = HashStore()
    assert next(UnitQueue(store, 3).units("dead")) == 0
    survivor = UnitQueue(store, 3)
    survivor.declare_dead("dead")
    assert drain(survivor) == [1, 2, 0]


def test_a_worker_that_is_told_to_stop_waits_for_nobody() -> None:
    store = HashStore()
    slow = UnitQueue(store, 2).units("slow")
    assert next(slow) == 0
    queue = UnitQueue(store, 2)
    units = queue.units("stopped")
    assert next(units) == 1
    queue.stop()
    assert list(units) == []

"""Every unit is scored, by whoever is alive to do it."""

from __future__ import annotations

import pytest
from dpo_cache.stages import heartbeat, unit_queue
from dpo_cache.stages.unit_queue import UnitQueue
from torch._C._distributed_c10d import HashStore


def drain(queue: UnitQueue) -> list[int]:
    done = []
    for unit in queue.units():
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
    first, second = UnitQueue(store, 4).units(), UnitQueue(store, 4).units()
    assert [next(first), next(second), next(first), next(second)] == [0, 1, 2, 3]


def test_the_unit_of_a_worker_whose_heart_stopped_is_taken_over() -> None:
    store = HashStore()
    dead = UnitQueue(store, 3)
    dead._owner = "dead"
    assert next(dead.units()) == 0
    survivor = UnitQueue(store, 3)
    assert drain(survivor) == [1, 2, 0]
    assert survivor.num_finished == 3


def test_a_unit_drawn_by_a_worker_that_died_before_claiming_it_is_not_lost() -> None:
    store = HashStore()
    store.add("units/drawn", 1)
    assert drain(UnitQueue(store, 2)) == [1, 0]


def test_a_unit_finished_twice_counts_once() -> None:
    queue = UnitQueue(HashStore(), 2)
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


def test_nonfinite_pairs_named_by_any_worker_are_told_once_each() -> None:
    store = HashStore()
    UnitQueue(store, 1).report_nonfinite([b"\x02" * 32, b"\x01" * 32])
    UnitQueue(store, 1).report_nonfinite([b"\x01" * 32])
    assert UnitQueue(store, 1).nonfinite_keys() == [b"\x01" * 32, b"\x02" * 32]


def test_the_unit_of_a_worker_declared_dead_is_taken_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 3600.0)
    store = HashStore()
    dead = UnitQueue(store, 3)
    dead._owner = "dead"
    assert next(dead.units()) == 0
    survivor = UnitQueue(store, 3)
    survivor.declare_dead("dead")
    assert drain(survivor) == [1, 2, 0]


def test_a_worker_that_is_told_to_stop_waits_for_nobody() -> None:
    store = HashStore()
    slow = UnitQueue(store, 2).units()
    assert next(slow) == 0
    queue = UnitQueue(store, 2)
    units = queue.units()
    assert next(units) == 1
    queue.stop()
    assert list(units) == []

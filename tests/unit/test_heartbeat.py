"""Whose heart stands still is told by a process that looks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from dpo_cache.stages.processes import heartbeat
from dpo_cache.stages.processes.heartbeat import STALE_AFTER_S, HeartMonitor
from torch._C._distributed_c10d import HashStore


def test_the_time_in_which_a_whole_job_was_suspended_makes_nobody_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """``scontrol suspend`` and Ctrl-Z stop all processes of a job; the one that wakes up first must not judge."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now))
    store = HashStore()
    store.add("heartbeats/other", 1)
    monitor = HeartMonitor(store)
    assert not monitor.has_stopped("other")
    clock.now += 100 * STALE_AFTER_S
    assert not monitor.has_stopped("other")
    for _ in range(int(STALE_AFTER_S)):
        clock.now += 1.0
        assert not monitor.has_stopped("other")
    clock.now += 1.0
    assert monitor.has_stopped("other")

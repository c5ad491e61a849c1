"""What the leading process of a build does about its scoring processes."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_plan import Unit
from dpo_cache.stages.console import progress
from dpo_cache.stages.processes.job_store import JobStore
from dpo_cache.stages.processes.ranks import Ranks
from dpo_cache.stages.scoring import scoring_job
from dpo_cache.stages.scoring.scoring_job import lead_scoring
from dpo_cache.stages.scoring.unit_queue import UnitQueue
from scoring_plans import EMPTY_PLAN

NOTHING = replace(EMPTY_PLAN, zero_stage=3)


def test_no_process_starts_where_nothing_is_to_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher the leader goes on to announce that all is done: the other ranks wait for it."""
    started: list[list[str]] = []

    def noted(commands: list[list[str]], *_: Any, **__: Any) -> list[str]:
        started.extend(commands)
        return []

    monkeypatch.setattr(scoring_job, "run_children", noted)
    job = JobStore(None)
    job.ranks = Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)
    outcome = lead_scoring(job, NOTHING, tmp_path / "plan", num_workers=1, total_tokens=0)
    assert started == []
    assert outcome.forwards == 0


def test_a_process_that_ends_all_that_share_the_weights_leaves_word_of_what_is_finished_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobStore(None)
    plan = replace(NOTHING, units=[Unit(start=0, stop=1), Unit(start=1, stop=2)])

    def lose_one(*_: Any, survivors_go_on: bool, **__: Any) -> list[str]:
        assert not survivors_go_on
        queue = UnitQueue(job.store, 2)
        queue.finish(next(queue.units("worker")))
        raise DpoCacheError("a process of this job ended with SIGKILL")

    monkeypatch.setattr(scoring_job, "run_children", lose_one)
    with pytest.raises(DpoCacheError) as ended:
        lead_scoring(job, plan, tmp_path / "plan", num_workers=2, total_tokens=2)
    assert ended.value.found == "a process of this job ended with SIGKILL\n  1 of 2 units are finished and stay"
    assert "run the same command again" in str(ended.value.next_step)


def test_progress_is_told_in_pairs_and_tokens_with_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, log = JobStore(None), io.StringIO()
    plan = replace(EMPTY_PLAN, units=[Unit(start=0, stop=1500), Unit(start=1500, stop=2000)])

    def score(*_: Any, while_waiting: Callable[[], None], **__: Any) -> list[str]:
        queue = UnitQueue(job.store, 2)
        for unit, (pairs, tokens) in zip(queue.units("worker"), [(1500, 6000), (500, 2000)], strict=True):
            queue.add("pairs", pairs)
            queue.add("tokens", tokens)
            queue.finish(unit)
            while_waiting()
        return []

    monkeypatch.setattr(scoring_job, "run_children", score)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    lead_scoring(job, plan, tmp_path / "plan", num_workers=1, total_tokens=8000)
    half = next(line for line in log.getvalue().splitlines() if "6.00k/8.00k" in line)
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*tok/s, pairs=1,500/2,000, units=1/2, GiB=0.0\]", half), half

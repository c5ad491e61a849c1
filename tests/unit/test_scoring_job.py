"""What the leading process of a build does about its scoring processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dpo_cache.stages.processes.job_store import JobStore
from dpo_cache.stages.processes.ranks import Ranks
from dpo_cache.stages.scoring import scoring_job
from dpo_cache.stages.scoring.scoring_job import lead_scoring
from scoring_plans import EMPTY_PLAN

NOTHING = replace(EMPTY_PLAN, zero_stage=3)


def test_no_process_starts_where_nothing_is_to_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher the leader goes on to announce that all is done: the other ranks wait for it."""
    started: list[list[str]] = []

    def noted(commands: list[list[str]], *_: Any, **__: Any) -> list[str]:
        started.extend(commands)
        return []

    monkeypatch.setattr(scoring_job, "run_children", noted)
    ranks = Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)
    outcome = lead_scoring(JobStore(None), NOTHING, tmp_path / "plan", ranks=ranks, num_workers=1, total_tokens=0)
    assert started == []
    assert outcome.forwards == 0

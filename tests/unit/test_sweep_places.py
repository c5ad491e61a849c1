"""Runs are spread over GPUs without sharing one, or over the cores of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.sweeping.sweep_config import SweepConfig
from dpo_cache.stages.sweeping.sweep_places import places_for, visible_gpus
from dpo_cache.stages.training.train_config import TrainConfig


def places(gpus: str, num_gpus: int | None = None, **options: Any) -> list[dict[str, str]]:
    run = TrainConfig(cache=Path("c"), output=Path("o"), num_gpus=num_gpus)
    return places_for(SweepConfig(**options), [run], gpus=list(gpus))


def test_without_a_word_a_run_gets_all_gpus_and_runs_take_turns() -> None:
    assert places("0123") == [{}]


def test_gpus_are_dealt_in_whole_groups_and_none_twice() -> None:
    assert places("01234", gpus_per_run=2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places("3567", gpus_per_run=1)] == ["3", "5", "6", "7"]


def test_on_a_cpu_runs_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(12)))
    assert places("") == [{}]
    assert places("", parallel=3) == [{"OMP_NUM_THREADS": "4"}] * 3
    assert places("", parallel=3, num_gpus=2) == [{"OMP_NUM_THREADS": "2"}] * 3


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        ("01", {"gpus_per_run": 3}, "--gpus-per-run is 3\n  expected: at most 2"),
        ("01", {"parallel": 2}, "--parallel is for a CPU"),
        ("", {"gpus_per_run": 1}, "this machine has no GPU"),
        ("01", {"gpus_per_run": 1, "num_gpus": 2}, "num-gpus is 2, but a run gets 1 GPU"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(gpus: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DpoCacheError) as refused:
        places(gpus, **options)
    assert message in str(refused.value)


def test_a_launcher_would_start_the_sweep_once_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(DpoCacheError, match="start dpo-sweep once"):
        places("")


def test_gpus_keep_the_names_they_were_made_visible_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5,GPU-ab"}) == ["5", "GPU-ab"]


@pytest.mark.parametrize("options", [{"rungs": 3}, {"halving_factor": 2.0}, {"halving_by": "accuracy"}])
def test_halvings_options_mean_nothing_to_a_grid(options: dict[str, Any]) -> None:
    with pytest.raises(DpoCacheError, match="has no effect without --strategy halving"):
        SweepConfig(**options)
    SweepConfig(strategy="halving", **options)

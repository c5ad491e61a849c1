"""The loop of successive halving: who is trained up to where, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpo_cache.stages.sweeping.sweep_config import SweepConfig
from dpo_cache.stages.sweeping.sweep_grid import SweepPoint
from dpo_cache.stages.sweeping.sweep_run import SweepRun
from dpo_cache.stages.sweeping.sweep_rungs import train_by_halving
from dpo_cache.stages.training.train_config import TrainConfig

TOTAL_STEPS = 8


class Trained:
    """Stands for processes and record: every run is evaluated where it stops, with the accuracy it was given."""

    def __init__(self, accuracies: Mapping[str, float], failing: Sequence[str] = ()) -> None:
        self.rungs: list[dict[str, int]] = []
        self.given_up: list[set[str]] = []
        self._accuracies = accuracies
        self._failing = failing

    def train(self, runs: Sequence[SweepRun], *, until: Mapping[str, int]) -> None:
        self.rungs.append({run.name: until[run.name] for run in runs})
        for run in runs:
            figures = {"eval/rewards/accuracy": self._accuracies[run.name], "eval/rewards/margin": 1.0}
            line = {"training_step": until[run.name], "eval/loss": 0.5, **figures}
            with (run.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def train_to_the_end(self, runs: Sequence[SweepRun]) -> None:
        self.train(runs, until=dict.fromkeys([run.name for run in runs], TOTAL_STEPS))

    def has_failed(self, name: str) -> bool:
        return name in self._failing

    def give_up(self, names: set[str]) -> None:
        self.given_up.append(set(names))


def halve(folder: Path, trained: Trained, betas: Mapping[str, float], **options: Any) -> None:
    runs = []
    for name, beta in betas.items():
        config = TrainConfig(cache=folder, output=folder / name, beta=beta)
        config.output.mkdir()
        recipe: Any = SimpleNamespace(total_steps=TOTAL_STEPS, objective=config.resolved_objective())
        runs.append(SweepRun(point=SweepPoint(name=name, options={"beta": beta}, config=config), recipe=recipe))
    stand_in: Any = trained
    train_by_halving(runs, SweepConfig(strategy="halving", **options), stand_in, stand_in)


BETAS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def test_the_worse_half_is_given_up_at_every_rung(tmp_path: Path) -> None:
    trained = Trained({"a": 0.5, "b": 0.9, "c": 0.6, "d": 0.8})
    halve(tmp_path, trained, BETAS)
    assert trained.rungs == [dict.fromkeys("abcd", 2), dict.fromkeys("bd", 4), {"b": TOTAL_STEPS}]
    assert trained.given_up == [{"a", "c"}, {"d"}]


def test_a_run_that_failed_is_neither_compared_nor_trained_any_further(tmp_path: Path) -> None:
    trained = Trained({"a": 0.5, "b": 0.9, "c": 0.6, "d": 0.8}, failing=["b"])
    halve(tmp_path, trained, BETAS, rungs=2, halving_factor=3.0)
    assert trained.rungs == [dict.fromkeys("abcd", 3), {"d": TOTAL_STEPS}]
    assert trained.given_up == [{"a", "c"}]


def test_margins_of_different_betas_are_compared_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halve(tmp_path, Trained(dict.fromkeys("abcd", 0.5)), BETAS, halving_by="margin")
    assert "--halving-by margin compares figures of different units" in capsys.readouterr().err


def test_accuracies_are_compared_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halve(tmp_path, Trained(dict.fromkeys("abcd", 0.5)), BETAS)
    assert "warning" not in capsys.readouterr().err

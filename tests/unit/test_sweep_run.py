"""What a point of a sweep is judged by: the evaluation after the very update at which points are compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_cache.stages.sweeping.sweep_grid import SweepPoint
from dpo_cache.stages.sweeping.sweep_run import Score, SweepRun
from dpo_cache.stages.training.train_config import TrainConfig


def sweep_run(output: Path, accuracies: dict[int, float], margin: float = 1.0) -> SweepRun:
    """A run that was evaluated after these updates."""
    config = TrainConfig(cache=Path("cache"), output=output)
    lines = [
        {"training_step": step, "eval/loss": 0.5, "eval/rewards/accuracy": accuracy, "eval/rewards/margin": margin}
        for step, accuracy in accuracies.items()
    ]
    output.mkdir()
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe: Any = SimpleNamespace(objective=config.resolved_objective())
    return SweepRun(point=SweepPoint(name=output.name, options={}, config=config), recipe=recipe)


def test_a_run_has_the_same_score_at_a_rung_however_far_it_has_come(tmp_path: Path) -> None:
    score = sweep_run(tmp_path / "run", {0: 0.5, 10: 0.6, 20: 0.9}).held_out_score(10)
    assert score is not None
    assert score.accuracy == 0.6


def test_a_run_that_went_past_a_rung_without_an_evaluation_has_no_score_there(tmp_path: Path) -> None:
    assert sweep_run(tmp_path / "run", {0: 0.5, 20: 0.9}).held_out_score(10) is None


def test_a_run_that_has_diverged_is_not_judged_by_the_accuracy_it_was_given(tmp_path: Path) -> None:
    diverged = sweep_run(tmp_path / "diverged", {10: 0.9}, margin=math.inf).last_score(held_out=True)
    trained = sweep_run(tmp_path / "trained", {10: 0.4}, margin=-1.0).last_score(held_out=True)
    assert diverged.accuracy is None
    assert sorted([trained, diverged], key=Score.key) == [diverged, trained]

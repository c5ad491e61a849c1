"""Which evaluation counts as the best, also after a resume."""

from __future__ import annotations

import math
from pathlib import Path

from dpo_cache.stages.training.best_model import BestModel


def line(step: int, accuracy: float, margin: float = 0.0) -> dict[str, float]:
    return {"training_step": step, "eval/rewards/accuracy": accuracy, "eval/rewards/margin": margin}


def best_steps(best: BestModel, lines: list[dict[str, float]]) -> list[float]:
    kept = []
    for evaluated in lines:
        if best.is_beaten_by(evaluated):
            best.remember(evaluated, is_main=True)
            kept.append(evaluated["training_step"])
    return kept


def test_the_first_of_the_best_is_kept_and_the_untrained_policy_never(tmp_path: Path) -> None:
    lines = [line(0, 0.9), line(2, 0.5), line(4, 0.7), line(6, 0.7), line(8, 0.6)]
    assert best_steps(BestModel(tmp_path, by="accuracy", last_step=0), lines) == [2, 4]
    assert best_steps(BestModel(tmp_path, by=None, last_step=0), lines) == []


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    lines = [line(2, 0.5, margin=math.nan), line(4, 0.5, margin=-1.0), line(6, 0.5, margin=math.nan)]
    assert best_steps(BestModel(tmp_path, by="margin", last_step=0), lines) == [4]
    assert best_steps(BestModel(tmp_path, by="margin", last_step=8), [line(8, 0.9, margin=math.inf)]) == []


def test_the_field_is_the_one_asked_for(tmp_path: Path) -> None:
    lines = [line(2, 0.9, margin=0.1), line(4, 0.8, margin=0.2)]
    assert best_steps(BestModel(tmp_path, by="margin", last_step=0), lines) == [2, 4]


def test_a_resumed_run_knows_the_best_before_and_forgets_what_comes_again(tmp_path: Path) -> None:
    best_steps(BestModel(tmp_path, by="accuracy", last_step=0), [line(2, 0.6), line(4, 0.8)])
    kept = {"field": "eval/rewards/accuracy", "value": 0.8, "training_step": 4}
    assert BestModel(tmp_path, by="accuracy", last_step=4).kept == kept
    assert BestModel(tmp_path, by="accuracy", last_step=3).kept is None
    assert BestModel(tmp_path, by="margin", last_step=4).kept is None
    assert best_steps(BestModel(tmp_path, by="accuracy", last_step=4), [line(6, 0.7), line(8, 0.9)]) == [8]
    # Killed after the evaluation of update 8, resumed from a checkpoint at 6.
    assert best_steps(BestModel(tmp_path, by="accuracy", last_step=6), [line(8, 0.9)]) == [8]

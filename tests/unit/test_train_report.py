"""The closing lines of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dpo_cache.stages.training.train_report import TrainReport

BEFORE = {"training_step": 0.0, "eval/rewards/accuracy": 0.5, "eval/rewards/margin": 0.0}


def report(eval_after: dict[str, float], best: dict[str, Any] | None = None) -> TrainReport:
    return TrainReport(
        output="run",
        steps=4,
        total_steps=4,
        pairs=32,
        seconds=2.0,
        step0=None,
        eval_before=BEFORE,
        eval_after=eval_after,
        last={},
        best=best,
    )


def test_held_out_figures_are_told_where_they_are_numbers() -> None:
    told = "held out: reward accuracy 50.0% before, 75.0% after, margin 0.2"
    assert told in report({**BEFORE, "eval/rewards/accuracy": 0.75, "eval/rewards/margin": 0.2}).summary()
    assert "held out" not in report({"training_step": 4.0, "eval/loss": 0.7}).summary()


def test_an_evaluation_that_is_not_finite_ends_in_a_warning_also_where_it_was_read_from_the_disk(
    tmp_path: Path,
) -> None:
    diverged = {**BEFORE, "eval/rewards/accuracy": math.nan, "eval/rewards/margin": -math.inf}
    ours = replace(report(diverged), output=str(tmp_path), step0={"loss": math.nan, "max_per_token": math.inf})
    ours.write()
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)["step0"]["loss"] is None
    for told in (ours, TrainReport.read(tmp_path)):
        lines = told.summary().splitlines()
        assert "held out: reward accuracy 50.0% before, not finite after, margin not finite" in lines
        figures = "eval/rewards/accuracy, eval/rewards/margin"
        assert lines[-1].startswith(f"warning: the last evaluation has figures that are not finite ({figures}), so ")
    assert "warning" not in report(BEFORE).summary()


@pytest.mark.parametrize(
    ("by", "value", "figure"), [("accuracy", 0.75, "accuracy 75.0%"), ("margin", 0.2, "margin 0.2")]
)
def test_the_best_model_that_was_kept_is_told_with_its_update_and_its_figure(
    by: str, value: float, figure: str
) -> None:
    best = {"field": f"eval/rewards/{by}", "value": value, "training_step": 2}
    told = f"best model: run/best, after update 2: held-out reward {figure}"
    assert told in report(BEFORE, best).summary().splitlines()
    assert "best model" not in report(BEFORE).summary()

"""The closing lines of a run."""

from __future__ import annotations

from dpo_cache.stages.training.train_report import TrainReport

BEFORE = {"training_step": 0.0, "eval/rewards/accuracy": 0.5, "eval/rewards/margin": 0.0}


def report(eval_after: dict[str, float]) -> TrainReport:
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
    )


def test_held_out_figures_are_told_where_they_are_numbers() -> None:
    told = "held out: reward accuracy 50.0% before, 75.0% after, margin 0.2"
    assert told in report({**BEFORE, "eval/rewards/accuracy": 0.75, "eval/rewards/margin": 0.2}).summary()
    # Of a finished run that is resumed, what was not a number is left out.
    assert "held out" not in report({"training_step": 4.0, "eval/rewards/accuracy": 0.0}).summary()

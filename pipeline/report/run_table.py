"""Runs side by side: what they differ in, what came of them, and the check each of them began with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .page_content import STEP_ZERO_COLUMNS, RunRow, RunTable, StepZeroRow
from .run_record import RunRecord
from .run_series import training_seconds

NOT_A_DIFFERENCE = frozenset(
    {
        *("output", "resume", "plan", "dry_run", "stop_after_steps", "num_gpus"),
        *("checkpointing_steps", "keep_last_n_checkpoints", "logging_steps", "eval_steps"),
        *("run_name", "with_tracking", "wandb_project", "wandb_entity", "wandb_tags", "with_tensorboard"),
        *("push_to_hub", "hub_model_id", "hub_revision", "hub_private"),
    }
)
"""Settings that say where and how a run goes on, not what is trained."""
ACCURACY, MARGIN = "eval/rewards/accuracy", "eval/rewards/margin"


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedRun:
    """A run and its place among all runs of the page."""

    number: int
    record: RunRecord


def run_table(
    heading: str,
    runs: Sequence[NumberedRun],
    *,
    best_first: bool,
    note: str = "",
    states: Mapping[str, str] | None = None,
) -> RunTable:
    """Put runs side by side.

    Args:
        heading: Above the table.
        runs: The runs.
        best_first: Finished ones by held-out accuracy, then the others. Ties stay in their order: a larger margin may
            be the work of a larger beta.
        note: What to know about it.
        states: By the name of a run's folder, where somebody else knows more of it than its files say.
    """
    settings = differing_settings([run.record for run in runs])
    ordered = sorted(runs, key=_badness) if best_first else list(runs)
    return RunTable(
        heading=heading,
        note=note,
        columns=[
            *(name.replace("_", " ") for name in settings),
            "held-out accuracy",
            "held-out margin",
            "held-out loss",
            "final loss",
            "time",
        ],
        rows=[
            RunRow(
                number=run.number,
                name=run.record.name,
                state=_state(run.record, (states or {}).get(run.record.folder.name)),
                cells=[
                    *(_setting(name, run.record.settings.get(name)) for name in settings),
                    _share(run.record.last(ACCURACY)),
                    figure(run.record.last(MARGIN)),
                    figure(run.record.last("eval/loss")),
                    figure(run.record.last("train_loss")),
                    _duration(run.record),
                ],
            )
            for run in ordered
        ],
    )


def differing_settings(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_A_DIFFERENCE)
    return [name for name in names if len({_setting(name, run.settings.get(name)) for run in runs if run.settings}) > 1]


def step_zero_row(run: NumberedRun) -> StepZeroRow:
    """What ``step0.json`` says; differences in nats per token."""
    figures = run.record.step_zero
    unknown = ["–"] * len(STEP_ZERO_COLUMNS)
    if figures is None:
        passed, result, cells = False, "not made: the run ended before it", unknown
    else:
        try:
            cells = [
                "–" if figures["loss"] is None else f"{figures['loss']:.6f}",
                "–" if figures["expected_loss"] is None else f"{figures['expected_loss']:.6f}",
                figure(figures["mean_per_token"]),
                figure(figures["max_per_token"]),
                figure(figures["bound_per_token"]),
                f"{figures['max_in_bounds']:.2%}",
                str(figures["dtype"]),
                str(figures["pairs"]),
            ]
            passed = figures["within_bound"] is True
            result = "within the bound" if passed else "beyond the bound; trained all the same"
        except (KeyError, TypeError, ValueError):
            passed, result, cells = False, "its step0.json cannot be read", unknown
    return StepZeroRow(number=run.number, name=run.record.name, passed=passed, result=result, cells=cells)


def figure(value: object) -> str:
    """A number with four digits that count; a dash for none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.4g}"


def _badness(run: NumberedRun) -> tuple[bool, float]:
    accuracy = run.record.last(ACCURACY)
    return not run.record.is_finished, math.inf if accuracy is None else -accuracy


def _state(run: RunRecord, known: str | None) -> str:
    total = run.total_updates
    updates = f"{run.updates_done}" if total in (None, run.updates_done) else f"{run.updates_done} of {total}"
    return f"{known or ('finished' if run.is_finished else 'unfinished')}, {updates} updates"


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "none" if name == "eval_mixture" else "default"
    return value if isinstance(value, str) else json.dumps(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _duration(run: RunRecord) -> str:
    seconds = next(reversed(training_seconds(run)), math.nan)
    if not math.isfinite(seconds):
        return "–"
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"

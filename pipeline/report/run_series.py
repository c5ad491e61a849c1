"""The curves of a run: which fields are drawn, over updates and over training time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .run_record import Line, RunRecord

MAX_POINTS = 1000
"""Points of one curve, unless there is less room; of more, the lowest and highest of each stretch are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One field, drawn for all runs.

    Attributes:
        title: What it is, for people.
        unit: What is counted.
        field: Its name in a step's line.
        eval_field: Its name in an evaluation's line; None where evaluation says nothing of interest.
    """

    title: str
    unit: str
    field: str
    eval_field: str | None = None


def _chart(title: str, unit: str, field: str, *, evaluated: bool = False) -> Chart:
    held_out = f"eval/{field}" if evaluated else None
    return Chart(title=title, unit=unit, field=field, eval_field=held_out)


ONE_BETA = "comparable only within one loss and beta"
CHARTS = (
    Chart(title="Loss", unit="mean over pairs", field="train_loss", eval_field="eval/loss"),
    _chart("Reward accuracy", "share of pairs", "rewards/accuracy", evaluated=True),
    _chart("Reward margin", f"chosen less rejected; {ONE_BETA}", "rewards/margin", evaluated=True),
    _chart("Reward of the chosen response", f"β times nats; {ONE_BETA}", "rewards/chosen", evaluated=True),
    _chart("Reward of the rejected response", f"β times nats; {ONE_BETA}", "rewards/rejected", evaluated=True),
    _chart("Log-probability of the chosen response", "nats per token", "logps/chosen_per_token", evaluated=True),
    _chart("Log-probability of the rejected response", "nats per token", "logps/rejected_per_token", evaluated=True),
    _chart("Learning rate", "of the update", "learning_rate"),
    _chart("Gradient norm", "before clipping", "grad_norm"),
    _chart("Balancing loss", "of the experts", "aux_loss", evaluated=True),
    _chart("Speed", "tokens per second", "perf/tokens_per_second"),
    _chart("Model FLOPs utilisation", "share of the peak", "perf/mfu"),
    _chart("Peak memory", "GiB, the fullest rank", "perf/peak_memory_gib"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One field of one run.

    Attributes:
        field: Its name in ``metrics.jsonl``.
        steps: Updates done at each point.
        seconds: Training time at each point; not a number where it is not known.
        values: Not a number where the run logged null.
        lines: Lines that it was made from: more than there are points where it was thinned.
    """

    field: str
    steps: list[int]
    seconds: list[float]
    values: list[float]
    lines: int

    @property
    def is_evaluation(self) -> bool:
        """Whether it is of held-out pairs."""
        return self.field.startswith("eval/")


def series_of(run: RunRecord, chart: Chart, *, max_points: int = MAX_POINTS) -> list[Series]:
    """The curves of one run in one chart: training, then evaluation; none that were never logged."""
    clock = _clock(run)
    found = [_series(run.steps, chart.field, clock, max_points)]
    if chart.eval_field is not None:
        found.append(_series(run.evaluations, chart.eval_field, clock, max_points))
    return [series for series in found if series.lines]


def training_seconds(run: RunRecord) -> list[float]:
    """Seconds of training up to each logged step, what lies between updates (evaluation, checkpoints) included.

    A line holds no time, but how many pairs were done since the line before it, and how many a second. Time that a
    run lay stopped does not count.
    """
    num_pairs = run.resolved.get("num_pairs")
    if not isinstance(num_pairs, int):
        return [math.nan] * len(run.steps)
    epochs = [0.0, *(line.get("epoch", math.nan) for line in run.steps)]
    rates = [line.get("perf/pairs_per_second", math.nan) for line in run.steps]
    taken = [
        (after - before) * num_pairs / rate if rate else math.nan
        for (before, after), rate in zip(pairwise(epochs), rates, strict=True)
    ]
    return list(accumulate(taken))


def _clock(run: RunRecord) -> dict[int, float]:
    """Training time by updates done; an evaluation lies where the update before it does."""
    return {0: 0.0} | dict(zip((_step(line) for line in run.steps), training_seconds(run), strict=True))


def _series(lines: Sequence[Line], field: str, clock: dict[int, float], max_points: int) -> Series:
    points = [(_step(line), line[field]) for line in lines if field in line]
    shown = thinned([value for _, value in points], max_points=max_points)
    return Series(
        field=field,
        steps=[points[place][0] for place in shown],
        seconds=[clock.get(points[place][0], math.nan) for place in shown],
        values=[points[place][1] for place in shown],
        lines=len(points),
    )


def thinned(values: Sequence[float], *, max_points: int) -> list[int]:
    """Places of the points to draw: all, or the lowest and highest of equal stretches and both ends.

    A mean would hide the one spike that somebody looks for.
    """
    if len(values) <= max_points:
        return list(range(len(values)))
    stretches = max_points // 2 - 1
    bounds = [round(number * len(values) / stretches) for number in range(stretches + 1)]
    kept = {0, len(values) - 1}
    for start, stop in pairwise(bounds):
        finite = [place for place in range(start, stop) if math.isfinite(values[place])] or [start]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def _step(line: Line) -> int:
    return int(line["training_step"])

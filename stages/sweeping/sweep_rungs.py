"""Successive halving, carried out: train all runs up to a rung, compare them, give up the worse, and so on.

The rules are in ``sweep_halving.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..console.counted_noun import counted
from ..console.terminal import say
from .sweep_config import DEFAULT_HALVING_FACTOR, DEFAULT_RUNGS, SweepConfig
from .sweep_grid import SweepPoint
from .sweep_halving import (
    better_ones,
    comparable,
    default_figure,
    given_up_on_a_tie,
    margins_compare,
    rung_shares,
    rung_steps,
    separations_compare,
)
from .sweep_processes import SweepProcesses
from .sweep_record import SweepRecord
from .sweep_run import Score, SweepRun


def train_by_halving(
    runs: Sequence[SweepRun], config: SweepConfig, processes: SweepProcesses, record: SweepRecord
) -> None:
    """Train the runs from rung to rung, and those that are left to the end.

    Args:
        runs: All runs of the sweep.
        config: How they are compared, and how often.
        processes: Trains them.
        record: Told which runs are given up.

    Raises:
        KeyboardInterrupt: Asked to stop; what was under way has saved.
    """
    points = [run.point for run in runs]
    factor = config.halving_factor or DEFAULT_HALVING_FACTOR
    by = config.halving_by or default_figure(points)
    _warn_of_unlike_margins(points, by=by)
    separations = separations_compare(points)
    left = list(runs)
    *rungs, _end = rung_shares(config.rungs or DEFAULT_RUNGS, factor)
    for share in rungs:
        if len(left) <= 1:
            break  # there is nothing left to compare with
        steps = {run.name: rung_steps(share, run.recipe.total_steps) for run in left}
        processes.train(left, until=steps)
        left = [run for run in left if not record.has_failed(run.name)]
        scores = _scores_at(steps, left, separations=separations)
        _say_who_is_not_compared(left, scores, share=share)
        if not scores:
            continue
        kept = better_ones(scores, factor=factor, by=by)
        _say_who_continues(scores, kept, share=share, by=by)
        given_up = scores.keys() - set(kept)
        record.give_up(given_up)
        left = [run for run in left if run.name not in given_up]
    processes.train_to_the_end(left)


def _scores_at(steps: Mapping[str, int], runs: Sequence[SweepRun], *, separations: bool) -> dict[str, Score]:
    """The scores after these updates; a run that was not evaluated there has none."""
    found = {run.name: run.held_out_score(steps[run.name]) for run in runs}
    return {name: comparable(score, separations=separations) for name, score in found.items() if score is not None}


def _warn_of_unlike_margins(points: Sequence[SweepPoint], *, by: str) -> None:
    if by == "margin" and not margins_compare(points):
        say(
            "warning: the points differ in loss or beta, and a margin grows with beta: --halving-by margin compares "
            "figures of different units; --halving-by accuracy does not"
        )


def _say_who_is_not_compared(runs: Sequence[SweepRun], scores: Mapping[str, Score], *, share: float) -> None:
    unjudged = [run.name for run in runs if run.name not in scores]
    if unjudged:
        say(f"not evaluated after {share:.0%} of the updates, so not compared there: {', '.join(unjudged)}")


def _say_who_continues(scores: Mapping[str, Score], kept: Sequence[str], *, share: float, by: str) -> None:
    say(
        f"after {share:.0%} of the updates, {len(kept)} of {counted(len(scores), 'point')} will continue: "
        f"{', '.join(kept)}"
    )
    tied = given_up_on_a_tie(scores, kept, by=by)
    if tied:
        say(f"given up with the same {by} as a point that continues: {', '.join(tied)}")

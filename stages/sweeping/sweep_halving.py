"""Successive halving: all points train for a share of their updates, and the better ones train further.

With 8 points, a factor of 2 and 3 rungs: 8 points for a quarter of their updates, 4 to the half, 2 to the end. The
schedule of the learning rate is the whole run's at every rung, so a point that is not given up ends where it would
have ended without halving. (Jamieson and Talwalkar 2016, arXiv 1502.07943; there each rung trains from the
start, here a run resumes from its checkpoint.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ...errors import DpoCacheError
from .sweep_grid import SweepPoint
from .sweep_run import Score


def refuse_points_without_margin(points: Sequence[SweepPoint]) -> None:
    """Refuse to judge points by rewards that one of them does not have.

    Raises:
        DpoCacheError: Naming the first such point.
    """
    for point in points:
        if point.config.eval_mixture is None:
            raise DpoCacheError(
                f"--strategy halving judges by held-out pairs, and point {point.name} has none",
                next_step="add eval-mixture under train:",
            )
        if not point.config.resolved_objective().uses_reference:
            raise DpoCacheError(
                f"--strategy halving judges by rewards, and the loss of point {point.name} has none",
                expected="losses that use the reference",
            )


def default_figure(points: Sequence[SweepPoint]) -> str:
    """The figure that decides by default: margins tell more than accuracies do, but only if all have one unit."""
    return "margin" if margins_compare(points) else "accuracy"


def margins_compare(points: Sequence[SweepPoint]) -> bool:
    """Whether the margins of these points can be compared: a margin is beta times nats, of the objective's unit."""
    objectives = [point.config.resolved_objective() for point in points]
    losses = {tuple((loss.name, loss.beta) for loss in objective.losses) for objective in objectives}
    return len(losses) == 1 and separations_compare(points)


def separations_compare(points: Sequence[SweepPoint]) -> bool:
    """Whether margin / beta of these points can be compared: all in nats per response, or all in nats per token."""
    objectives = [point.config.resolved_objective() for point in points]
    kinds = {(each.averages, each.f_divergence, each.f_alpha, each.ld_alpha) for each in objectives}
    return len(kinds) == 1


def comparable(score: Score, *, separations: bool) -> Score:
    """A score without margin / beta where that has another unit at other points: a tie of the accuracy then stays one.

    Args:
        score: Of one point.
        separations: Whether all points have one unit, from :func:`separations_compare`.
    """
    return score if separations else replace(score, separation=None)


def rung_shares(rungs: int, factor: float) -> list[float]:
    """The share of its updates that a run has done when it is compared, for each rung; the last is 1."""
    return [factor ** -(rungs - 1 - rung) for rung in range(rungs)]


def rung_steps(share: float, total_steps: int) -> int:
    """Updates of a run up to a rung."""
    return min(total_steps, math.ceil(share * total_steps - 1e-9))  # a third of nine is three


def better_ones(scores: Mapping[str, Score], *, factor: float, by: str) -> list[str]:
    """The points that continue, in their given order: one in ``factor``, rounded up; of equals the earlier ones.

    Args:
        scores: The score of each point, by name.
        factor: One point in this many continues.
        by: ``accuracy`` or ``margin``.
    """
    kept = sorted(scores, key=lambda name: scores[name].key(by), reverse=True)[: math.ceil(len(scores) / factor)]
    return [name for name in scores if name in kept]


def given_up_on_a_tie(scores: Mapping[str, Score], kept: Collection[str], *, by: str) -> list[str]:
    """The points given up although a point that continues has no better figure: only the second figure decided."""
    figures = {name: score.key(by)[0] for name, score in scores.items()}
    lowest = min(figures[name] for name in kept)
    return [name for name in scores if name not in kept and figures[name] == lowest]

"""Successive halving: all points train for a share of their updates, the better ones go on for longer.

With 8 points, a factor of 2 and 3 rungs: 8 points for a quarter of their updates, 4 to the half, 2 to the end. The
schedule of the learning rate is the whole run's at every rung, so a point that is not given up ends where it would
have ended without halving. (Jamieson and Talwalkar 2016, arXiv 1502.07943; there the budget of a rung is spent anew,
here a run goes on from its checkpoint.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import DpoCacheError
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
        if not any(loss.traits.uses_reference for loss in point.config.resolved_loss().losses):
            raise DpoCacheError(
                f"--strategy halving judges by rewards, and the loss of point {point.name} has none",
                expected="losses that use the reference",
            )


def in_one_unit(points: Sequence[SweepPoint]) -> bool:
    """Whether margins of these points can be compared: a margin is beta times nats, of a loss's own kind."""
    return len({tuple((loss.name, loss.beta) for loss in point.config.resolved_loss().losses) for point in points}) == 1


def rung_shares(rungs: int, factor: float) -> list[float]:
    """The share of its updates that a run has done when it is compared, for each rung; the last is 1."""
    return [factor ** -(rungs - 1 - rung) for rung in range(rungs)]


def rung_steps(share: float, total_steps: int) -> int:
    """Updates of a run up to a rung."""
    return min(total_steps, math.ceil(share * total_steps - 1e-9))  # a third of nine is three


def better_ones(scores: Mapping[str, Score], *, factor: float, by: str) -> list[str]:
    """The points that go on, in the order they had: one in ``factor``, rounded up; of equals the earlier ones."""
    kept = sorted(scores, key=lambda name: scores[name].key(by), reverse=True)[: math.ceil(len(scores) / factor)]
    return [name for name in scores if name in kept]

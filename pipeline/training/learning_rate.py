"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "constant")


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Number of warm-up steps, rounded down as open-instruct rounds it."""
    assert 0 <= warmup_ratio <= 1
    return int(total_steps * warmup_ratio)


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of update number ``step``, counted from 0.

    The values are those of ``transformers.get_scheduler`` (``constant`` being its ``constant_with_warmup``), so the
    first update of a run with warm-up has learning rate 0.

    Args:
        step: Update, from 0 to ``total_steps − 1``.
        peak: The rate at the end of the warm-up.
        schedule: ``linear`` falls to 0 at ``total_steps``, ``cosine`` by half a cosine wave, ``constant`` stays.
        warmup_steps: Updates over which the rate rises linearly from 0.
        total_steps: Updates in the whole run.
    """
    assert schedule in SCHEDULES
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

"""The learning rate against the schedules of transformers."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.pipeline.training.learning_rate import learning_rate, warmup_steps
from transformers import get_scheduler


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
def test_every_step_is_that_of_transformers(schedule: str, theirs: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        ours = learning_rate(step, peak=2e-5, schedule=schedule, warmup_steps=warmup, total_steps=20)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        scheduler.step()


def test_the_first_step_of_a_warmup_is_zero() -> None:
    assert learning_rate(0, peak=1.0, schedule="linear", warmup_steps=4, total_steps=10) == 0.0


def test_warmup_steps_are_rounded_down() -> None:
    assert warmup_steps(0.1, 529) == 52

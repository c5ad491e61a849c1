"""What an update is said to have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.pipeline.training.weight_change import MAX_ELEMENTS, WeightSample
from training_factory import make_engine, random_pairs, train_steps


def changed_at_all_stages(folder: str, learning_rates: list[float]) -> list[Any]:
    """Of one update after another: the shares in float32 and in bfloat16."""
    of_engines = []
    for dtype in ("float32", "bfloat16"):
        for stage in range(4):
            engine = make_engine(Path(folder), zero_stage=stage, num_ranks=2, dtype=dtype)
            shares = []
            for learning_rate in learning_rates:
                before = WeightSample(engine.master_weights())
                train_steps(engine, [random_pairs(4)], learning_rate=learning_rate, micro_steps=1)
                changed = before.changed(engine.device)
                shares.append((changed.float32, changed.bfloat16))
            of_engines.append((f"stage {stage}, {dtype}", shares))
    return of_engines


def test_a_small_update_changes_the_float32_weights_and_hardly_any_in_bfloat16(tmp_path: Path) -> None:
    of_ranks = run_ranks(changed_at_all_stages, str(tmp_path), [0.0, 1e-6, 0.1], num_ranks=2)
    assert of_ranks[0] == of_ranks[1]
    for name, (none, small, large) in of_ranks[0]:
        assert none == [0.0, 0.0], name
        assert small[0] > 0.75, name  # the rows of tokens that occur in no pair stay
        assert small[1] < 0.05, name
        assert large[0] >= large[1] > 0.75, name


@pytest.mark.usefixtures("one_rank")
def test_the_sample_of_a_large_weight_is_spread_over_its_columns() -> None:
    weight = torch.zeros(1024, 256)
    assert weight.numel() > 2 * MAX_ELEMENTS
    before = WeightSample([weight, weight.T, torch.zeros(0)])
    weight[:, 0] = 1.0
    changed = before.changed(torch.device("cpu"))
    assert changed.float32 == changed.bfloat16 == pytest.approx(1 / 256, rel=0.05)

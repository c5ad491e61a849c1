"""Global batches: every pair of an epoch exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.global_batches import GlobalBatchPlan, Rows
from hypothesis import given
from hypothesis import strategies as st


def _order(num_pairs: int, epoch: int) -> Rows:
    return np.random.RandomState(epoch).permutation(num_pairs).astype(np.int64)


def _plan(num_pairs: int, size: int) -> GlobalBatchPlan:
    return GlobalBatchPlan(
        num_pairs=num_pairs, global_batch_size=size, epoch_order=lambda epoch: _order(num_pairs, epoch)
    )


@given(num_pairs=st.integers(1, 200), size=st.integers(1, 64), epochs=st.integers(1, 3))
def test_an_epoch_holds_every_pair_once_and_only_its_last_batch_is_short(
    num_pairs: int, size: int, epochs: int
) -> None:
    plan = _plan(num_pairs, size)
    batches = [plan.rows(step) for step in range(plan.total_steps(num_epochs=epochs))]
    assert plan.steps_per_epoch == -(-num_pairs // size)
    for epoch in range(epochs):
        of_epoch = batches[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert np.concatenate(of_epoch).tolist() == _order(num_pairs, epoch).tolist()
        assert all(len(rows) == size for rows in of_epoch[:-1])
        for step, rows in enumerate(of_epoch, start=epoch * plan.steps_per_epoch):
            pairs = plan.epochs_after(step + 1) - plan.epochs_after(step)
            assert pairs * num_pairs == pytest.approx(len(rows))
        assert plan.epochs_after((epoch + 1) * plan.steps_per_epoch) == epoch + 1


def test_a_batch_does_not_depend_on_the_batches_asked_for_before() -> None:
    steps = [7, 0, 11, 3, 8]
    jumping = _plan(10, 3)
    assert [jumping.rows(step).tolist() for step in steps] == [_plan(10, 3).rows(step).tolist() for step in steps]


def test_max_steps_overrides_the_epochs() -> None:
    assert _plan(10, 3).total_steps(num_epochs=2) == 8
    assert _plan(10, 3).total_steps(num_epochs=0.5) == 2
    assert _plan(10, 3).total_steps(num_epochs=2, max_steps=5) == 5


def test_a_share_of_an_epoch_is_not_rounded_up_by_how_floats_multiply() -> None:
    assert _plan(50, 1).total_steps(num_epochs=1.1) == 55  # 1.1 * 50 is 55.00000000000001


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(DpoCacheError, match="no pair to train on"):
        _plan(0, 3)
    with pytest.raises(DpoCacheError, match="the global batch is 0 pairs"):
        _plan(3, 0)

"""Log lines: the same numbers however the pairs are split."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.flops import ModelCost
from dpo_cache.pipeline.scoring.scoring_batch import Layout, PairLogps
from dpo_cache.pipeline.training import metrics as metrics_module
from dpo_cache.pipeline.training.metrics import PairMetrics, step_line
from dpo_cache.pipeline.training.micro_batch import ScoredMicroBatch, collate
from dpo_cache.pipeline.training.objective import resolve_objective
from dpo_cache.pipeline.training.preference_loss import preference_loss

pytestmark = pytest.mark.usefixtures("one_rank")

CPU = torch.device("cpu")


def _scored(
    pairs: Sequence[tuple[float, float, float, float]], *, loss: str = "dpo", aux_loss: float | None = None
) -> ScoredMicroBatch:
    """Pairs given as (πc, πr, fc, fr), all of 2 prompt, 3 chosen and 4 rejected tokens."""
    rows = [
        ScoredPair(
            key=bytes(32),
            pair=TokenPair(
                prompt_ids=np.array([number, 1], np.int32),
                chosen_ids=np.arange(3, dtype=np.int32),
                rejected_ids=np.arange(4, dtype=np.int32),
            ),
            ref_chosen_logps=pair[2],
            ref_rejected_logps=pair[3],
            ref_chosen_common_logps=pair[2],
            ref_rejected_common_logps=pair[3],
            chosen_tokens=3,
            rejected_tokens=4,
        )
        for number, pair in enumerate(pairs)
    ]
    micro_batch = collate(rows, Layout.PREFIX_SHARED)
    values = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 4)
    policy = PairLogps(
        chosen_logps_B=values[:, 0],
        rejected_logps_B=values[:, 1],
        chosen_common_logps_B=values[:, 0],
        rejected_common_logps_B=values[:, 1],
        chosen_tokens_B=torch.full((len(pairs),), 3),
        rejected_tokens_B=torch.full((len(pairs),), 4),
        token_logps_N=torch.zeros(7 * len(pairs)),
        aux_loss=None if aux_loss is None else torch.tensor(aux_loss),
    )
    outcomes = preference_loss(resolve_objective(loss), policy, micro_batch.reference)
    return ScoredMicroBatch(micro_batch=micro_batch, policy=policy, outcomes=outcomes)


def _metrics(loss: str = "dpo", **options: Any) -> PairMetrics:
    return PairMetrics(resolve_objective(loss), device=CPU, **{"tie_margin": 1e-4, **options})


def test_every_field_stands_on_the_page_about_training() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    metrics = _metrics()
    metrics.add(_scored(PAIRS, aux_loss=1.0))
    for name in step_line(metrics, training_step=1, learning_rate=1e-6, epoch=0.5, grad_norm=2.0):
        assert f"`{name}`" in page, name


PAIRS = [(-10.0, -12.0, -11.0, -10.0), (-9.0, -8.0, -8.5, -9.0), (-7.0, -7.5, -7.25, -7.0), (-3.0, -4.0, -3.0, -4.5)]
LEARNED = ("train_loss", "logps/", "rewards/")


def _learned(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith(LEARNED)}


def lines_of_my_share(splits: list[int]) -> list[dict[str, float]]:
    return [line_of_my_share(num_micro_steps) for num_micro_steps in splits]


def line_of_my_share(num_micro_steps: int) -> dict[str, float]:
    """A step with five pairs, so one rank or micro-step has more than another, and some have none."""
    pairs = [*PAIRS, PAIRS[0]]
    metrics = _metrics()
    shares = dist.get_world_size() * num_micro_steps
    for micro_step in range(num_micro_steps):
        metrics.add(_scored(pairs[dist.get_rank() * num_micro_steps + micro_step :: shares]))
    return _learned(metrics.reduce())


def test_numbers_do_not_depend_on_the_split_into_ranks_and_micro_steps() -> None:
    expected = line_of_my_share(1)
    assert line_of_my_share(4) == pytest.approx(expected, rel=1e-14)
    for num_ranks, splits in ((2, [2]), (4, [1, 3])):
        for of_rank in run_ranks(lines_of_my_share, splits, num_ranks=num_ranks):
            for found in of_rank:
                assert found == pytest.approx(expected, rel=1e-14)


def memory_and_utilisation() -> list[float]:
    """The most memory, and the utilisation for each token a second, of ranks that do and need different amounts."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_module, "peak_memory_bytes", lambda _device: (rank + 1) << 30)
        patch.setattr(metrics_module, "peak_flops_per_second", lambda _device: 1e12)
        metrics = _metrics(cost=COST)
        metrics.add(_scored(PAIRS))
        line = metrics.reduce()
    return [line["perf/peak_memory_gib"], line["perf/mfu"] / line["perf/tokens_per_second"]]


def test_memory_is_that_of_the_fullest_rank_and_utilisation_is_of_all_devices() -> None:
    memory, utilisation = memory_and_utilisation()
    assert memory == 1.0
    for of_rank in run_ranks(memory_and_utilisation, num_ranks=2):
        assert of_rank == pytest.approx([2.0, utilisation / 2])


def test_the_fields_of_a_line() -> None:
    metrics = _metrics()
    metrics.add(_scored(PAIRS))
    line = step_line(metrics, training_step=3, learning_rate=1e-6, epoch=0.5, grad_norm=2.0)
    assert list(line) == [
        "training_step",
        "learning_rate",
        "epoch",
        "train_loss",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_per_token",
        "logps/rejected_per_token",
        "tokens/chosen",
        "tokens/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/average",
        "rewards/accuracy",
        "rewards/margin",
        "perf/tokens_per_second",
        "perf/pairs_per_second",
        "perf/peak_memory_gib",
        "grad_norm",
    ]
    assert line["logps/chosen_per_token"] == pytest.approx(-29 / 3 / 4)
    assert line["logps/rejected_per_token"] == pytest.approx(-31.5 / 4 / 4)
    assert (line["tokens/chosen"], line["tokens/rejected"]) == (3, 4)
    # Log-ratios: chosen 1, −0.5, 0.25, 0; rejected −2, 1, −0.5, 0.5.
    assert line["rewards/chosen"] == pytest.approx(0.1 * 0.75 / 4)
    assert line["rewards/rejected"] == pytest.approx(0.1 * -1.0 / 4)
    assert line["rewards/average"] == pytest.approx(0.1 * -0.25 / 8)
    assert line["rewards/margin"] == pytest.approx(0.1 * 1.75 / 4)
    assert line["rewards/accuracy"] == 0.5
    assert line["logps/chosen"] == pytest.approx(-29 / 4)
    assert line["train_loss"] == pytest.approx(sum(math.log1p(math.exp(-0.1 * m)) for m in (3, -1.5, 0.75, -0.5)) / 4)


def test_logps_are_averages_for_a_loss_on_averages() -> None:
    metrics = _metrics("dpo_norm")
    metrics.add(_scored(PAIRS, loss="dpo_norm"))
    line = metrics.reduce()
    assert line["logps/chosen"] == pytest.approx(-29 / 3 / 4)
    assert line["logps/rejected"] == pytest.approx(-31.5 / 4 / 4)


def test_a_loss_without_reference_logs_no_rewards() -> None:
    metrics = _metrics("simpo")
    metrics.add(_scored(PAIRS, loss="simpo"))
    assert not [name for name in metrics.reduce() if name.startswith("rewards/")]


def test_a_line_begun_before_a_stop_is_ended_after_it() -> None:
    whole, first, second = _metrics(), _metrics(), _metrics()
    for micro_batch in (PAIRS[:2], PAIRS[2:]):
        whole.add(_scored(micro_batch, aux_loss=0.5))
    first.add(_scored(PAIRS[:2], aux_loss=0.5))
    second.restore_sums(first.unlogged_sums())
    second.add(_scored(PAIRS[2:], aux_loss=0.5))
    ours, theirs = second.reduce(), whole.reduce()
    assert ours.keys() == theirs.keys()
    for name in (name for name in theirs if not name.startswith("perf/")):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name


def test_the_speed_of_a_line_begun_before_a_stop_is_over_the_time_before_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 30.0, 1000.0, 1010.0, 1010.0])  # begin, stop; begin again, line, next line begins
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    first = _metrics()
    first.add(_scored(PAIRS[:2]))
    unlogged = first.unlogged_sums()
    second = _metrics()
    second.restore_sums(unlogged)
    second.add(_scored(PAIRS[2:]))
    assert second.reduce()["perf/pairs_per_second"] == len(PAIRS) / (30 + 10)


def test_ties_and_differences_within_rounding_count_half() -> None:
    metrics = _metrics(tie_margin=1e-3)
    metrics.add(_scored([(-5.0, -6.0, -5.0, -6.0), (-5.0, -6.0, -5.001, -6.0), (-5.0, -6.0, -5.1, -6.0)]))
    assert metrics.reduce()["rewards/accuracy"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_a_tie_is_one_of_the_rewards_that_are_compared() -> None:
    """Responses of 3 and 4 tokens: rewards of sums may be far apart where those per token are not, and the reverse."""
    apart_in_sums, apart_per_token = (-6.0, -8.0, -3.0, -4.0), (-6.0, -8.0, -3.0, -5.0)
    accuracies = {}
    for loss in ("dpo", "dpo_norm"):
        for pair in (apart_in_sums, apart_per_token):
            metrics = _metrics(loss, tie_margin=1e-3)
            metrics.add(_scored([pair], loss=loss))
            accuracies[loss, pair] = metrics.reduce()["rewards/accuracy"]
    assert accuracies == {
        ("dpo", apart_in_sums): 1.0,  # rc = −3, rr = −4
        ("dpo", apart_per_token): 0.5,  # rc = rr = −3
        ("dpo_norm", apart_in_sums): 0.5,  # −1 per token both
        ("dpo_norm", apart_per_token): 0.0,  # −1 and −3/4
    }


def test_sums_that_differ_by_rounding_are_a_tie_whatever_their_lengths() -> None:
    metrics = _metrics(tie_margin=1e-3)
    metrics.add(_scored([(-6.0, -8.0, -3.0, -5.003), (-6.0, -8.0, -3.0, -5.004)]))  # 7 tokens: up to 3.5e-3 nats
    assert metrics.reduce()["rewards/accuracy"] == (0.5 + 0.0) / 2


def test_a_margin_that_is_no_number_is_neither_right_nor_wrong_nor_a_tie() -> None:
    metrics = _metrics()
    metrics.add(_scored([(math.nan, -6.0, -5.0, -6.0), (-5.0, -6.0, -5.1, -6.0)]))
    line = metrics.reduce()
    assert math.isnan(line["rewards/margin"])
    assert math.isnan(line["rewards/accuracy"])


def test_a_line_starts_over_after_it_was_reduced() -> None:
    metrics = _metrics()
    metrics.add(_scored(PAIRS))
    metrics.reduce()
    metrics.add(_scored(PAIRS[:1]))
    assert metrics.reduce()["logps/chosen"] == -10.0


def test_evaluation_has_the_same_names_behind_a_prefix_and_no_train_loss() -> None:
    metrics = _metrics(prefix="eval/")
    metrics.add(_scored(PAIRS))
    line = metrics.reduce()
    assert "eval/loss" in line
    assert "eval/rewards/accuracy" in line
    assert all(name.startswith("eval/") for name in line)
    assert "eval/train_loss" not in line


def test_the_balancing_loss_is_weighted_by_pairs() -> None:
    metrics = _metrics()
    metrics.add(_scored(PAIRS[:3], aux_loss=1.0))
    metrics.add(_scored(PAIRS[3:], aux_loss=5.0))
    assert metrics.reduce()["aux_loss"] == pytest.approx(2.0)


COST = ModelCost(backbone_weights=1000, head_weights=10, attention_width=4)


def test_mfu_is_three_forward_passes_over_time_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "peak_flops_per_second", lambda device: 1e12)
    metrics = _metrics(cost=COST)
    metrics.add(scored := _scored(PAIRS[:2]))
    line = metrics.reduce()
    batch = scored.micro_batch.batch
    seconds = batch.num_tokens / line["perf/tokens_per_second"]
    forward = 2 * (1000 * batch.num_tokens + 2 * 4 * batch.num_attended + 10 * batch.num_scored)
    assert line["perf/mfu"] == pytest.approx(3 * forward / (seconds * 1e12))


def test_mfu_is_left_out_where_no_peak_is_known() -> None:
    metrics = _metrics(cost=COST)
    metrics.add(_scored(PAIRS))
    assert "perf/mfu" not in metrics.reduce()


def test_perf_counts_a_shared_prompt_once() -> None:
    metrics = _metrics()
    metrics.add(_scored(PAIRS[:2]))
    line = metrics.reduce()
    assert line["perf/tokens_per_second"] / line["perf/pairs_per_second"] == pytest.approx(2 + 3 + 4)

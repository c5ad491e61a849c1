"""Losses that sort the global batch: the same gradients however it is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.training.host_group import forget_host_group, host_group, open_host_group
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.objective import resolve_objective
from dpo_cache.pipeline.training.preference_loss import preference_loss
from dpo_cache.pipeline.training.sorted_partners import sorted_partners
from torch.nn.functional import logsigmoid
from training_factory import LAYOUT, random_pairs, scored_pair, tiny_policy

SHIFTS = [9.0, -12.0, 4.0, -3.0, 15.0, -7.0, 1.0]
PAIRS = [
    scored_pair(row.pair, row.ref_chosen_logps + shift, row.ref_rejected_logps - shift)
    for row, shift in zip(random_pairs(7), SHIFTS, strict=True)
]
"""Far enough from the policy for the two to put the pairs in different orders."""

NAMES = ["aot", "aot_unpaired"]


def gradients_of_splits(splits: list[int]) -> list[list[list[float]]]:
    return [[_gradient(name, micro_steps) for name in NAMES] for micro_steps in splits]


def _gradient(name: str, micro_steps: int) -> list[float]:
    """In float64, summed over the ranks; with seven pairs some shares are larger, and with many some are empty."""
    objective = resolve_objective(name)
    scorer = PairScorer(tiny_policy().double())
    shares = dist.get_world_size() * micro_steps
    first = dist.get_rank() * micro_steps
    batches = [collate(PAIRS[share::shares], LAYOUT) for share in range(first, first + micro_steps)]
    with torch.no_grad():
        partners = sorted_partners(objective, [(batch, scorer(batch.batch)) for batch in batches])
    for batch, found in zip(batches, partners, strict=True):
        outcomes = preference_loss(objective, scorer(batch.batch), batch.reference, found)
        torch.autograd.backward(outcomes.objective_B.sum() / len(PAIRS))
    gradient = _flat_gradient(scorer)
    dist.all_reduce(gradient)
    return gradient.tolist()


def _flat_gradient(scorer: PairScorer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in scorer.parameters() if parameter.grad is not None])


def _plain_gradient(name: str, pairs: Sequence[ScoredPair]) -> list[float]:
    """All pairs in one batch, sorted by PyTorch with the graph attached."""
    scorer = PairScorer(tiny_policy().double())
    batch = collate(pairs, LAYOUT)
    policy, reference = scorer(batch.batch), batch.reference
    if name == "aot":
        upper = (policy.chosen_logps_B - policy.rejected_logps_B).sort().values
        lower = (reference.chosen_logps_B - reference.rejected_logps_B).sort().values
    else:
        upper = (policy.chosen_logps_B - reference.chosen_logps_B).sort().values
        lower = (policy.rejected_logps_B - reference.rejected_logps_B).sort().values
    torch.autograd.backward(-logsigmoid(0.1 * (upper - lower)).mean())
    return _flat_gradient(scorer).tolist()


@pytest.mark.parametrize(("num_ranks", "splits"), [(1, [1, 3]), (2, [2, 5])])
def test_any_split_gives_the_gradient_of_the_whole_batch(num_ranks: int, splits: list[int]) -> None:
    expected = [_plain_gradient(name, PAIRS) for name in NAMES]
    for of_rank in run_ranks(gradients_of_splits, splits, num_ranks=num_ranks):
        for of_split in of_rank:
            for name, found, wanted in zip(NAMES, of_split, expected, strict=True):
                # Not 1e-15: RMSNorm of transformers computes in float32 whatever the model's dtype.
                assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


@pytest.mark.usefixtures("one_rank")
def test_the_values_of_a_global_batch_leave_the_device_once_and_travel_over_the_hosts_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each transfer waits for the device, and the training's own group would take pickled objects through the GPUs."""
    open_host_group()
    try:
        objective, scorer = resolve_objective("aot"), PairScorer(tiny_policy())
        batches = [collate(part, LAYOUT) for part in (PAIRS[:3], PAIRS[3:], [])]
        with torch.no_grad():
            scored = [(batch, scorer(batch.batch)) for batch in batches]
        transfers, groups = [], []
        to_list, gather = torch.Tensor.tolist, dist.all_gather_object

        def counted(tensor: torch.Tensor) -> object:
            transfers.append(tensor.shape)
            return to_list(tensor)

        def watched(found: list[Any], mine: Any, group: Any = None) -> None:
            groups.append(group)
            with monkeypatch.context() as inside:  # what torch itself does to gather is not ours
                inside.setattr(torch.Tensor, "tolist", to_list)
                gather(found, mine, group=group)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        monkeypatch.setattr(dist, "all_gather_object", watched)
        partners = sorted_partners(objective, scored)
        assert transfers == [(7, 4)]
        assert groups == [host_group()]
        assert groups != [None]
        assert [len(of_batch.chosen_B) for of_batch in partners] == [3, 4, 0]
    finally:
        forget_host_group()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_sorted_in_parts_would_have_another_gradient(name: str) -> None:
    """What the pass over the global batch is for, and why the test above can fail."""
    whole = torch.tensor(_plain_gradient(name, PAIRS))
    parts = sum(len(part) / len(PAIRS) * torch.tensor(_plain_gradient(name, part)) for part in (PAIRS[:3], PAIRS[3:]))
    assert (whole - parts).norm() > 0.1 * whole.norm()

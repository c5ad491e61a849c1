"""The partners of losses that sort the global batch, found before the pass that carries gradients.

Sorting within a micro-batch would make the objective depend on how much memory a device has. So the whole global batch
is scored first without gradients, its values of all ranks come together and are sorted, and each pair takes along
what it is matched with. The gradient pass then needs no other pair, and any split gives the same gradients.

Shape suffix: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..scoring.scoring_batch import PairLogps
from .host_group import host_group
from .micro_batch import MicroBatch
from .objective import Objective
from .pair_terms import SortedPartners, pair_terms


def sorted_partners(objective: Objective, scored: Sequence[tuple[MicroBatch, PairLogps]]) -> list[SortedPartners]:
    """Partners of this rank's pairs in a global batch, micro-batch by micro-batch; collective.

    Args:
        objective: Says how the tail of a longer response is weighed.
        scored: This rank's micro-batches of one global batch with their forward passes; at least one.
    """
    values_B4 = torch.cat([_sort_values(objective, micro_batch, policy) for micro_batch, policy in scored])
    keys = [key for micro_batch, _ in scored for key in micro_batch.keys]
    mine = [SortValues(key, *values) for key, values in zip(keys, values_B4.tolist(), strict=True)]
    of_ranks: list[list[SortValues]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine, group=host_group())  # objects of the host, not by way of the GPUs
    partners = match([pair for of_rank in of_ranks for pair in of_rank])
    start = sum(len(of_rank) for of_rank in of_ranks[: dist.get_rank()])
    of_mine_B3 = values_B4.new_tensor(partners[start : start + len(mine)]).reshape(-1, 3)
    result, first = [], 0
    for micro_batch, _ in scored:
        margin_B, rejected_B, chosen_B = of_mine_B3[first : first + micro_batch.num_pairs].unbind(1)
        result.append(SortedPartners(reference_margin_B=margin_B, rejected_B=rejected_B, chosen_B=chosen_B))
        first += micro_batch.num_pairs
    return result


class SortValues(NamedTuple):
    """What one pair is sorted by; the values in nats."""

    key: bytes
    policy_margin: float
    reference_margin: float
    chosen: float
    rejected: float


def _sort_values(objective: Objective, micro_batch: MicroBatch, policy: PairLogps) -> Tensor:
    """The numbers of :class:`SortValues`, still on the device, shape (B, 4)."""
    terms = pair_terms(objective, policy, micro_batch.reference)
    return torch.stack([terms.policy_margin_B, terms.reference_margin_B, terms.chosen_B, terms.rejected_B], dim=1)


def match(pairs: Sequence[SortValues]) -> list[tuple[float, float, float]]:
    """For each pair ``fc − fr``, ``rr`` and ``rc`` of its partners, see :class:`~.pair_terms.SortedPartners`.

    Equal values are ordered by example key, so that the outcome does not depend on the order of ``pairs``.
    """

    def places_by(value: Callable[[SortValues], float]) -> list[int]:
        return sorted(range(len(pairs)), key=lambda place: (value(pairs[place]), pairs[place].key))

    by_chosen, by_rejected = places_by(lambda pair: pair.chosen), places_by(lambda pair: pair.rejected)
    by_policy, by_reference = places_by(lambda pair: pair.policy_margin), places_by(lambda pair: pair.reference_margin)
    of_policy = dict(zip(by_policy, by_reference, strict=True))
    of_chosen = dict(zip(by_chosen, by_rejected, strict=True))
    of_rejected = dict(zip(by_rejected, by_chosen, strict=True))
    return [
        (pairs[of_policy[mine]].reference_margin, pairs[of_chosen[mine]].rejected, pairs[of_rejected[mine]].chosen)
        for mine in range(len(pairs))
    ]

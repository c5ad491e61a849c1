"""How a global batch is dealt to ranks and micro-batches.

Dealing depends on the hardware and changes nothing but speed, because the loss is divided by the number of pairs of
the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ..scoring.bin_packing import best_fit
from .global_batches import Rows


def deal(
    rows: Rows,
    pair_tokens: Sequence[int] | npt.NDArray[np.signedinteger[Any]],
    *,
    num_ranks: int,
    tokens_per_microbatch: int,
) -> list[list[Rows]]:
    """Deal a global batch to ranks and micro-batches by token count; a pure function.

    There are as few micro-steps as the token budget allows, the same number on every rank. Micro-batches that run at
    the same time are alike in cost, because under ZeRO-3 ranks wait for each other layer by layer, and so are the
    sums of the ranks. A pair longer than the budget stands alone in a micro-batch.

    Args:
        rows: Mixture rows of the global batch.
        pair_tokens: Tokens each of them costs when the prompt is computed once, in the same order.
        num_ranks: Ranks to deal to.
        tokens_per_microbatch: Most tokens a micro-batch may hold.

    Returns:
        For each rank its micro-batches, arrays of mixture rows. Some are empty where there are fewer pairs than
        micro-batches; a rank still takes part in that micro-step, with weight zero.

    Raises:
        DpoCacheError: A budget below 1.
    """
    costs = np.asarray(pair_tokens, dtype=np.int64)
    assert len(costs) == len(rows)
    assert num_ranks >= 1
    if tokens_per_microbatch < 1:
        raise DpoCacheError(f"--tokens-per-microbatch is {tokens_per_microbatch}", expected="at least 1")
    bins = _pack(costs, num_ranks, tokens_per_microbatch)
    loads = np.array([int(costs[members].sum()) for members in bins])

    ranks: list[list[Rows]] = [[] for _ in range(num_ranks)]
    rank_loads = np.zeros(num_ranks, dtype=np.int64)
    by_load = np.argsort(-loads, kind="stable")
    for first in range(0, len(bins), num_ranks):
        # The heaviest of these micro-batches goes to the rank that has had least so far.
        waiting = np.argsort(rank_loads, kind="stable")
        for rank, number in zip(waiting, by_load[first : first + num_ranks], strict=True):
            ranks[rank].append(rows[np.array(sorted(bins[number]), dtype=np.int64)])
            rank_loads[rank] += loads[number]
    return ranks


def _pack(costs: npt.NDArray[np.int64], num_ranks: int, budget: int) -> list[list[int]]:
    """Members of the bins: a multiple of ``num_ranks`` of them, as few as the budget allows, evenly filled."""
    longest_first = np.argsort(-costs, kind="stable")
    tight = best_fit(costs.tolist(), budget)
    fewest = math.ceil(int(np.minimum(costs, budget).sum()) / (budget * num_ranks))
    most = max(1, math.ceil(len(tight) / num_ranks))
    for micro_steps in range(max(1, fewest), most + 1):
        spread = _longest_first(costs, longest_first, micro_steps * num_ranks)
        _even_out(spread, costs)
        if _fits(spread, costs, budget):
            return spread
    tight += [[] for _ in range(most * num_ranks - len(tight))]
    _even_out(tight, costs)
    return tight


def _fits(bins: list[list[int]], costs: npt.NDArray[np.int64], budget: int) -> bool:
    return all(len(members) <= 1 or int(costs[members].sum()) <= budget for members in bins)


def _longest_first(costs: npt.NDArray[np.int64], longest_first: npt.NDArray[np.intp], num_bins: int) -> list[list[int]]:
    """Longest processing time first: each pair into the bin that is emptiest so far."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = np.zeros(num_bins, dtype=np.int64)
    for item in longest_first.tolist():
        lightest = int(loads.argmin())
        bins[lightest].append(item)
        loads[lightest] += costs[item]
    return bins


def _even_out(bins: list[list[int]], costs: npt.NDArray[np.int64]) -> None:
    """Exchange pairs between the heaviest bin and others, in place, until no exchange makes it lighter."""
    loads = np.array([int(costs[members].sum()) for members in bins])
    while _lower_heaviest(bins, loads, costs):
        pass


def _lower_heaviest(bins: list[list[int]], loads: npt.NDArray[np.int64], costs: npt.NDArray[np.int64]) -> bool:
    """Make the one move or swap that lowers the heavier of two bins most; False where none does."""
    heaviest = int(loads.argmax())
    best_gain, best_move = 0, (0, 0, 0, 0)
    for other in np.argsort(loads, kind="stable").tolist():
        distance = int(loads[heaviest] - loads[other])
        if distance // 2 <= best_gain:  # no exchange gains more than half the distance
            break
        given = costs[bins[heaviest]]
        taken = np.append(costs[bins[other]], 0)  # the last column: give, and take nothing back
        shift = given[:, None] - taken[None, :]
        gain = np.minimum(shift, distance - shift)
        place = int(gain.argmax())
        if gain.flat[place] > best_gain:
            best_gain = int(gain.flat[place])
            best_move = (other, *divmod(place, len(taken)), int(shift.flat[place]))
    if not best_gain:
        return False
    other, give, take, shifted = best_move
    item = bins[heaviest].pop(give)
    if take < len(bins[other]):
        bins[heaviest].append(bins[other].pop(take))
    bins[other].append(item)
    loads[heaviest] -= shifted
    loads[other] += shifted
    return True

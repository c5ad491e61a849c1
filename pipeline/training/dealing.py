"""How a global batch is dealt to ranks and micro-batches.

Dealing depends on the hardware and changes nothing but speed, because the objective is divided by the number of
pairs of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..scoring.bin_packing import best_fit, even_bins
from ..scoring.shape_rounding import ROW_MULTIPLE
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
    """
    costs = np.asarray(pair_tokens, dtype=np.int64)
    assert len(costs) == len(rows)
    assert num_ranks >= 1
    assert tokens_per_microbatch >= 1
    bins = _pack(costs, num_ranks, tokens_per_microbatch)
    return _to_ranks(rows, bins, [int(costs[members].sum()) for members in bins], num_ranks)


def deal_padded(
    rows: Rows,
    sequence_tokens: Sequence[int] | npt.NDArray[np.signedinteger[Any]],
    *,
    num_ranks: int,
    tokens_per_microbatch: int,
) -> list[list[Rows]]:
    """The same where every response has a row of its own with its prompt, as long as the longest of the micro-batch.

    Pairs alike in length share a micro-batch, so that hardly anything is padded.

    Args:
        rows: As for :func:`deal`.
        sequence_tokens: Tokens of each pair's prompt and longer response, in the same order.
        num_ranks: As for :func:`deal`.
        tokens_per_microbatch: Most tokens a micro-batch may compute, padding included.

    Returns:
        As :func:`deal`.
    """
    widths = -(-np.asarray(sequence_tokens, dtype=np.int64) // ROW_MULTIPLE) * ROW_MULTIPLE
    bins: list[list[int]] = []
    for item in np.argsort(-widths, kind="stable").tolist():
        if bins and 2 * (len(bins[-1]) + 1) * widths[bins[-1][0]] <= tokens_per_microbatch:
            bins[-1].append(item)
        else:
            bins.append([item])
    while len(bins) % num_ranks:
        fullest = max(range(len(bins)), key=lambda number: len(bins[number]))
        half = len(bins[fullest]) // 2
        bins += [bins[fullest][half:]]
        bins[fullest] = bins[fullest][:half]
    return _to_ranks(
        rows, bins, [2 * len(members) * int(widths[members].max(initial=0)) for members in bins], num_ranks
    )


def _to_ranks(rows: Rows, bins: list[list[int]], of_bins: Sequence[int], num_ranks: int) -> list[list[Rows]]:
    """Micro-batches to ranks: those that run at the same time are alike in load."""
    loads = np.array(of_bins)
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
    tight = best_fit(costs.tolist(), budget)
    fewest = math.ceil(int(np.minimum(costs, budget).sum()) / (budget * num_ranks))
    most = max(1, math.ceil(len(tight) / num_ranks))
    for micro_steps in range(max(1, fewest), most + 1):
        spread = even_bins(costs.tolist(), micro_steps * num_ranks)
        _even_out(spread, costs)
        if _fits(spread, costs, budget):
            return spread
    tight += [[] for _ in range(most * num_ranks - len(tight))]
    _even_out(tight, costs)
    return tight


def _fits(bins: list[list[int]], costs: npt.NDArray[np.int64], budget: int) -> bool:
    return all(len(members) <= 1 or int(costs[members].sum()) <= budget for members in bins)


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

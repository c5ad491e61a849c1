"""Which pairs make up each global batch, and how they are dealt to ranks and micro-batches.

A global batch is a number of pairs, the same whatever the hardware: its content depends on the mixture, the seed and
the step alone. Dealing it out depends on the hardware and changes nothing but speed, because the loss is divided by
the number of pairs of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GlobalBatch:
    """The pairs of one update.

    Attributes:
        step: Update, counted from 0.
        epoch: Pass over the mixture, counted from 0.
        rows: Mixture rows, in training order; the last batch of an epoch may be short.
        epochs_done: Epochs finished after this update, as a fraction.
    """

    step: int
    epoch: int
    rows: Rows
    epochs_done: float


class GlobalBatchPlan:
    """Step number to global batch. An epoch has ceil(pairs / batch size) steps; its last batch holds what is left.

    Args:
        num_pairs: Pairs in the mixture.
        global_batch_size: Pairs in a global batch.
        epoch_order: Epoch to the mixture's rows in the order of that epoch, each row once.

    Raises:
        DpoCacheError: An empty mixture or an impossible batch size.
    """

    def __init__(self, *, num_pairs: int, global_batch_size: int, epoch_order: Callable[[int], Rows]) -> None:
        if num_pairs < 1:
            raise DpoCacheError("the mixture holds no pair to train on")
        if global_batch_size < 1:
            raise DpoCacheError(f"the global batch is {global_batch_size} pairs", expected="at least 1")
        self.num_pairs = num_pairs
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = math.ceil(num_pairs / global_batch_size)
        self._epoch_order = epoch_order
        self._epoch = -1
        self._order: Rows = np.empty(0, dtype=np.int64)

    def total_steps(self, *, num_epochs: float, max_steps: int | None = None) -> int:
        """Updates in a run: ``max_steps`` where it is given, else as many as the epochs hold, rounded up."""
        if max_steps is not None:
            return max_steps
        return math.ceil(num_epochs * self.steps_per_epoch)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of update ``step``, counted from 0."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._epoch_order(epoch)
            self._epoch = epoch
            assert len(self._order) == self.num_pairs
        start = step_of_epoch * self.global_batch_size
        rows = self._order[start : start + self.global_batch_size]
        return GlobalBatch(step=step, epoch=epoch, rows=rows, epochs_done=epoch + (start + len(rows)) / self.num_pairs)


def deal(
    rows: Rows,
    pair_tokens: Sequence[int] | npt.NDArray[np.int64],
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
    tight = _best_fit(costs, longest_first, budget)
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


def _best_fit(costs: npt.NDArray[np.int64], longest_first: npt.NDArray[np.intp], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each pair into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in longest_first.tolist():
        cost = int(costs[item])
        best = min((number for number in range(len(bins)) if room[number] >= cost), key=lambda n: room[n], default=-1)
        if best < 0:
            bins.append([item])
            room.append(budget - cost)
        else:
            bins[best].append(item)
            room[best] -= cost
    return bins


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

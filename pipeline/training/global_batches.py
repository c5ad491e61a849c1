"""Which pairs make up each global batch.

A global batch is a number of pairs, the same whatever the hardware: its content depends on the mixture, the seed and
the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError

Rows = npt.NDArray[np.int64]
RowNumbers = npt.NDArray[np.signedinteger[Any]]


class GlobalBatchPlan:
    """Step number to global batch. An epoch has ceil(pairs / batch size) steps; its last batch holds what is left.

    Args:
        num_pairs: Pairs in the mixture.
        global_batch_size: Pairs in a global batch.
        epoch_order: Epoch to the mixture's rows in the order of that epoch, each row once.

    Raises:
        DpoCacheError: An empty mixture or an impossible batch size.
    """

    def __init__(self, *, num_pairs: int, global_batch_size: int, epoch_order: Callable[[int], RowNumbers]) -> None:
        if num_pairs < 1:
            raise DpoCacheError("the mixture holds no pair to train on")
        if global_batch_size < 1:
            raise DpoCacheError(f"the global batch is {global_batch_size} pairs", expected="at least 1")
        self.num_pairs = num_pairs
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = math.ceil(num_pairs / global_batch_size)
        self._epoch_order = epoch_order
        self._epoch = -1
        self._order: RowNumbers = np.empty(0, dtype=np.int32)

    def total_steps(self, *, num_epochs: float, max_steps: int | None = None) -> int:
        """Updates in a run: ``max_steps`` where it is given, else as many as the epochs hold, rounded up."""
        if max_steps is not None:
            return max_steps
        return math.ceil(round(num_epochs * self.steps_per_epoch, 6))  # 1.1 * 50 is 55.000000000000007

    def rows(self, step: int) -> Rows:
        """Mixture rows of update ``step``, counted from 0, in training order; for one thread at a time."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._epoch_order(epoch)
            self._epoch = epoch
            assert len(self._order) == self.num_pairs
        start = step_of_epoch * self.global_batch_size
        return self._order[start : start + self.global_batch_size].astype(np.int64)

    def epochs_after(self, updates_done: int) -> float:
        """Epochs that these updates finish, as a fraction."""
        epochs, steps_of_epoch = divmod(updates_done, self.steps_per_epoch)
        return epochs + steps_of_epoch * self.global_batch_size / self.num_pairs

"""How many weights an update changed: in float32, where it is kept, and in bfloat16, where it may not show yet.

At learning rates of preference tuning most updates are smaller than the last bit of a bfloat16 weight. They add up in
the optimizer's float32 weights; a rate too small for those too trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MAX_ELEMENTS = 65_536
"""Looked at of each tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedShares:
    """Shares of the weights that differ from before, 0 to 1.

    Attributes:
        float32: As the optimizer keeps them.
        bfloat16: Rounded to bfloat16.
    """

    float32: float
    bfloat16: float


class WeightSample:
    """Some elements of each tensor, evenly spaced, as they are now.

    Args:
        weights: The float32 weights that the optimizer holds on this rank.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._before = [_sample(weight).clone() for weight in weights]

    def changed(self, device: torch.device) -> ChangedShares:
        """What has changed since, over all ranks; all ranks call this.

        Args:
            device: Where the process group can reduce.
        """
        counts = torch.zeros(3, dtype=torch.float64)
        for before, weight in zip(self._before, self._weights, strict=True):
            after = _sample(weight)
            in_float32 = (after != before).sum()
            in_bfloat16 = (after.bfloat16() != before.bfloat16()).sum()
            counts += torch.stack([in_float32, in_bfloat16, in_float32.new_tensor(len(before))]).cpu()
        counts = counts.to(device)
        dist.all_reduce(counts)
        in_float32, in_bfloat16, seen = counts.tolist()
        return ChangedShares(float32=in_float32 / seen, bfloat16=in_bfloat16 / seen)


def _sample(weight: Tensor) -> Tensor:
    elements = weight.detach().flatten()  # a copy of a transposed weight, which has no flat view
    # Odd, so that it is no multiple of a row's length, which would sample one column.
    return elements[:: len(elements) // MAX_ELEMENTS | 1]

"""Whether a disk has room for what a run will write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ...errors import DpoCacheError
from ..scoring.quantization import num_elements


def check_free_space(
    folder: Path,
    *,
    parameters: Iterable[nn.Parameter],
    weight_bytes: int,
    keep_last: int | None,
    only_adapter: bool = False,
) -> None:
    """Refuse early a disk that the run would fill.

    Args:
        folder: Where checkpoints go.
        parameters: The policy's, partitioned or not; frozen ones are not in a checkpoint.
        weight_bytes: Bytes of a weight in the dtype computed in.
        keep_last: Checkpoints kept; one more exists while a new one is written. None counts as one.
        only_adapter: The model saved at the end is what was trained, without the frozen weights.

    Raises:
        DpoCacheError: There is less room than that.
    """
    trained = total = 0
    for parameter in parameters:
        numbers = num_elements(parameter)
        total += numbers
        trained += numbers if parameter.requires_grad else 0
    # Master weight and two moments in float32, and the weight itself; one more copy of the weights is the model.
    checkpoint = trained * (12 + weight_bytes)
    needed = checkpoint * ((keep_last or 1) + 1) + (trained if only_adapter else total) * weight_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DpoCacheError(
            f"{folder} has {free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB for {(keep_last or 1) + 1} checkpoints and the model",
            next_step="free some space, choose another --output, or lower --keep-last-n-checkpoints",
        )

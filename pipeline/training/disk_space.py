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
    held_bytes: int = 0,
    num_models: int = 1,
    saved_bytes: int | None = None,
    only_adapter: bool = False,
) -> None:
    """Refuse early a disk that the run would fill.

    Args:
        folder: Where checkpoints go.
        parameters: The policy's, partitioned or not; frozen ones are not in a checkpoint.
        weight_bytes: Bytes of a weight in the dtype computed in.
        keep_last: Checkpoints kept; one more exists while a new one is written. None counts as one.
        held_bytes: Of the checkpoints that an earlier part of the run left, and that count among those.
        num_models: Models written: the last one, and the best one where that is kept.
        saved_bytes: Bytes of a weight in those; None for ``weight_bytes``.
        only_adapter: The models saved are what was trained, without the frozen weights.

    Raises:
        DpoCacheError: There is less room than that.
    """
    trained = total = 0
    for parameter in parameters:
        numbers = num_elements(parameter)
        total += numbers
        trained += numbers if parameter.requires_grad else 0
    num_checkpoints = (keep_last or 1) + 1
    # Master weight and two moments in float32, and the weight itself.
    checkpoints = num_checkpoints * trained * (12 + weight_bytes)
    models = num_models * (trained if only_adapter else total) * (saved_bytes or weight_bytes)
    needed = max(0, checkpoints - held_bytes) + models
    free = shutil.disk_usage(folder).free
    if free < needed:
        held = f", {held_bytes / 2**30:.1f} GiB of which are there" if held_bytes else ""
        raise DpoCacheError(
            f"{folder} has {free / 2**30:.1f} GiB free",
            expected=f"{(checkpoints + models) / 2**30:.1f} GiB for {num_checkpoints} checkpoints{held}, and "
            + ("the model" if num_models == 1 else f"{num_models} models"),
            next_step="free some space, choose another --output, or lower --keep-last-n-checkpoints",
        )

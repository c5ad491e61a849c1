"""The pairs that were in hand when the objective or its gradient was not finite: written down, then the run stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ...errors import DpoCacheError
from .host_group import host_group, wait_for_all
from .run_file import write_run_json


def report_bad_batch(path: Path, *, reason: str, training_step: int, keys: Sequence[bytes]) -> NoReturn:
    """Gather the suspects of all ranks, write them on rank 0, and raise on every rank.

    Args:
        path: The file to write.
        reason: What was not finite: ``loss`` or ``gradient``.
        training_step: The update that was not applied, counted from 1.
        keys: Example keys of this rank's suspects, none where they lie on other ranks.

    Raises:
        DpoCacheError: Always, naming the file.
    """
    suspects: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(suspects, [key.hex() for key in keys], group=host_group())
    flat = [{"rank": rank, "key": key} for rank, of_rank in enumerate(suspects) for key in of_rank]
    if dist.get_rank() == 0:
        record = {"training_step": training_step, "not_finite": reason, "suspects": flat}
        write_run_json(path, record)
    wait_for_all()  # a rank that dies earlier could take rank 0 with it before the file is written
    raise DpoCacheError(
        f"the {reason} of step {training_step} is not finite; the update was not applied",
        expected="finite numbers",
        next_step=f"look at the {len(flat)} pairs listed in {path} (dpo-cache show CACHE --key KEY prints one); "
        "--resume would come to the same step again: start a run without them, or with a lower --learning-rate",
    )

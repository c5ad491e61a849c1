"""A second process group of the same ranks, over the network of the hosts, for waits that may take hours.

While rank 0 hashes 140 GB of weights, converts a checkpoint or writes the model, the others wait. A collective of the
training's own group may last half an hour, after which a rank counts as hung, and the watchdog of NCCL ends the job.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(hours=12)

_group: Any = None


def open_host_group() -> None:
    """Make the group; all ranks call this right after they have met."""
    global _group  # noqa: PLW0603  (one a process, as the group of torch.distributed itself)
    _group = dist.new_group(backend="gloo", timeout=PATIENCE)


def forget_host_group() -> None:
    """The ranks part."""
    global _group  # noqa: PLW0603
    _group = None


def host_group() -> Any:
    """The group; None, which is the training's own, where there is none."""
    return _group


def wait_for_all() -> None:
    """A barrier that is as patient as the work of one rank may take."""
    dist.barrier(group=_group)

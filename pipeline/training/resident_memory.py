"""The host memory that the ranks of a job hold, by which a model that was read whole on each of them shows."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from .host_group import host_group


def resident_bytes_of_ranks() -> list[int]:
    """The host memory of every rank's process, in bytes, the same list on all ranks; collective.

    It is 0 where the system does not say it as Linux does.
    """
    ours = torch.tensor(_resident_bytes(), dtype=torch.int64)
    of_ranks = [torch.zeros_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, ours, group=host_group())
    return [int(one) for one in of_ranks]


def _resident_bytes() -> int:
    table = Path("/proc/self/statm")
    return int(table.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if table.exists() else 0

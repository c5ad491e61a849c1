"""Where the runs of a sweep take place: which GPUs, or which share of the cores, each run that is under way gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from ...errors import DpoCacheError
from ..console.counted_noun import counted
from ..processes.child_processes import threads_for
from ..processes.ranks import ranks_from_environment
from ..training.train_config import TrainConfig
from .sweep_config import SweepConfig


def visible_gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """The GPUs of this process by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    environment = os.environ if environment is None else environment
    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def places_for(config: SweepConfig, runs: Sequence[TrainConfig], *, gpus: Sequence[str]) -> list[dict[str, str]]:
    """The variables of the process that runs at each place; as many runs are under way as there are places.

    Args:
        config: How many GPUs a run gets, or how many runs share a CPU.
        runs: The runs.
        gpus: The GPUs of this machine; none for a CPU.

    Raises:
        DpoCacheError: An option that this machine has no use for, or more GPUs than there are.
    """
    if ranks_from_environment() is not None:
        raise DpoCacheError(
            "a launcher started this process as one of several ranks",
            next_step="start dpo-sweep once, without a launcher",
        )
    if not gpus:
        return _cpu_places(config, most_ranks=max(run.num_gpus or 1 for run in runs))
    if config.parallel is not None:
        raise DpoCacheError("--parallel is for a CPU, and this machine has GPUs", next_step="use --gpus-per-run")
    each = config.gpus_per_run or len(gpus)
    if each > len(gpus):
        raise DpoCacheError(f"--gpus-per-run is {each}", expected=f"at most {len(gpus)}, the GPUs here")
    asked = max(run.num_gpus or 1 for run in runs)
    if asked > each:
        raise DpoCacheError(
            f"num-gpus is {asked}, but a run gets {counted(each, 'GPU')}", next_step=f"--gpus-per-run {asked}"
        )
    if each == len(gpus):
        return [{}]
    starts = range(0, len(gpus) - each + 1, each)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + each])} for start in starts]


def _cpu_places(config: SweepConfig, *, most_ranks: int) -> list[dict[str, str]]:
    if config.gpus_per_run is not None:
        raise DpoCacheError("--gpus-per-run is given, and this machine has no GPU", next_step="use --parallel")
    parallel = config.parallel or 1
    return [{}] if parallel == 1 else [threads_for(parallel * most_ranks)] * parallel

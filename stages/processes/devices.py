"""Which device a process computes on, and what is said when it cannot do what it is asked to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import DpoCacheError, first_line
from ..console.counted_noun import counted
from .ranks import Ranks


def device_of_rank(rank_of_node: int) -> torch.device:
    """The GPU of a process of this machine, made its current one; the CPU where there is no GPU.

    A cluster may show every process one GPU, its own (``srun --gpus-per-task``): then that is it, whatever the rank.

    Raises:
        DpoCacheError: More processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown_its_own = num_gpus == 1 and shown is not None and "," not in shown
    if rank_of_node >= num_gpus and not shown_its_own:
        raise DpoCacheError(
            f"process {rank_of_node + 1} of this machine has no GPU",
            expected=f"at most {num_gpus} processes, one for each GPU that torch sees",
        )
    # Batches change their size all the time: without this, free memory lies in pieces that fit nothing.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its former name, which torch reads only without the other
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", min(rank_of_node, num_gpus - 1))
    torch.cuda.set_device(device)
    return device


def num_processes(asked_for: int | None, ranks: Ranks | None, *, flag: str) -> int:
    """How many processes a job has, on all machines together; without a launcher one for each GPU of this machine.

    Args:
        asked_for: The user's number.
        ranks: This process's place where a launcher started it.
        flag: The option with that number.

    Raises:
        DpoCacheError: A launcher started another number here, or there are fewer GPUs.
    """
    if ranks is not None:
        if asked_for not in (None, ranks.ranks_per_node):
            raise DpoCacheError(
                f"{flag} is {asked_for}, but a launcher started {counted(ranks.ranks_per_node, 'process')} here",
                next_step=f"leave out {flag}",
            )
        return ranks.num_ranks
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked_for and 0 < num_gpus < asked_for:
        raise DpoCacheError(
            f"{flag} is {asked_for}, and this machine has {counted(num_gpus, 'GPU')}",
            expected="at most one process per GPU",
        )
    return asked_for or max(1, num_gpus)


def share_cores(processes_here: int) -> None:
    """Give this process its share of the machine's cores, whatever its launcher thought: torchrun allows one."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_here))


@contextmanager
def gpu_explained(less_memory: str) -> Iterator[None]:
    """Turn what a GPU refuses into a fault with a way out.

    Args:
        less_memory: What to do about a memory that is too small.

    Raises:
        DpoCacheError: The GPU's memory ran out, or flex_attention, all that is compiled here, cannot be for this GPU.
    """
    try:
        yield
    except torch.OutOfMemoryError as full:
        raise DpoCacheError(f"the GPU's memory ran out: {first_line(full)}", next_step=less_memory) from full
    except RuntimeError as failed:
        from torch._dynamo.exc import BackendCompilerFailed  # a second's work, and most processes compile nothing

        if not isinstance(failed, BackendCompilerFailed):
            raise
        raise DpoCacheError(
            f"flex_attention cannot be compiled for this GPU: {first_line(failed.inner_exception)}",
            next_step="build the cache with --attn-implementation sdpa; training follows it",
        ) from failed

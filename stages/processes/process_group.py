"""torch.distributed and the device of one rank, and a way to fail together."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.distributed as dist

from ...errors import DpoCacheError, first_line
from ...pipeline.training.host_group import forget_host_group, host_group, open_host_group
from ..console.terminal import say
from .child_processes import is_child
from .devices import device_of_rank
from .job_store import STORE_FAULTS
from .ranks import Ranks, rendezvous_environment
from .rendezvous import hosted_rendezvous
from .stop_request import stopped_at_once

TIMEOUT = timedelta(minutes=30)
Result = TypeVar("Result")


@contextmanager
def process_group(ranks: Ranks) -> Iterator[torch.device]:
    """Join the ranks of this job; gives this rank's device.

    Raises:
        DpoCacheError: This machine has more processes than GPUs, or the ranks do not find each other.
    """
    device = device_of_rank(ranks.rank_of_node)
    with _rendezvous(ranks, device):
        prepare_deepspeed()
        _meet(ranks, device)
        open_host_group()
        try:
            yield device
        except BaseException:
            # NCCL would wait for ranks that wait for this one: it is left as it is, and ends with the process.
            if device.type == "cpu" or ranks.num_ranks == 1:
                _part()
            raise
        _part()


def _meet(ranks: Ranks, device: torch.device) -> None:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if ranks.rank == 0 and ranks.num_ranks > 1 and not is_child():
        say(f"rank 0 of {ranks.num_ranks} meets the others at {place}")  # who meant to start one process sees it here
    try:
        with stopped_at_once():
            deepspeed.init_distributed(
                dist_backend="gloo" if device.type == "cpu" else "nccl",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=TIMEOUT,
            )
    except STORE_FAULTS as apart:
        raise DpoCacheError(
            f"rank {ranks.rank} of {ranks.num_ranks} did not meet the others at {place}: {first_line(apart)}",
            expected=f"a free port of rank 0's machine, and all ranks within {TIMEOUT.total_seconds() / 60:g} minutes",
            next_step="see that the launcher starts them all and that they reach that port; MASTER_PORT=… names "
            "another; for a run of this machine alone: env -u RANK -u WORLD_SIZE dpo-train …",
        ) from apart


def _part() -> None:
    forget_host_group()
    dist.destroy_process_group()


@contextmanager
def _rendezvous(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The variables that say which rank this is; processes that this one starts later are no ranks of this job."""
    rendezvous = rendezvous_environment(ranks) | deepspeed_device(ranks, device)
    before = dict(os.environ)
    # A rank that is alone meets nobody: it needs no port that another run on this machine may have.
    alone: AbstractContextManager[dict[str, str]] = hosted_rendezvous() if ranks.num_ranks == 1 else nullcontext({})
    with alone as hosted:
        os.environ.update({**rendezvous, **hosted})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def deepspeed_device(ranks: Ranks, device: torch.device) -> dict[str, str]:
    """The variable by which DeepSpeed finds this process's device: it takes ``LOCAL_RANK`` for the number of the GPU.

    srun does not set it, and where every process is shown its own GPU alone, that one has the number 0.
    """
    return {"LOCAL_RANK": str(device.index if device.type == "cuda" else ranks.rank_of_node)}


def all_or_none(work: Callable[[], Result], *, on: bool = True) -> Result | None:
    """Do something on some ranks; if it fails on one, all ranks raise the same fault.

    A rank that raised alone would leave the others waiting in their next collective. The fault of another machine than
    rank 0's names it: what is missing there may well be here.

    Args:
        work: What to do.
        on: Whether this rank does it.

    Returns:
        What ``work`` returned; None on the ranks that did not do it.

    Raises:
        DpoCacheError: It failed on some rank.
    """
    fault: DpoCacheError | None = None
    result: Result | None = None
    if on:
        try:
            result = work()
        except DpoCacheError as raised:
            fault = raised
    faults: list[tuple[str, DpoCacheError | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(faults, (socket.gethostname(), fault), group=host_group())
    for machine, first in faults:
        if first is not None:
            raise first if machine == faults[0][0] else first.located(f"on {machine}")
    return result


def decided_by_first(decide: Callable[[], Result]) -> Result:
    """Let rank 0 decide and tell the others: what a folder holds may look different from another machine.

    Raises:
        DpoCacheError: Rank 0 could not decide; on all ranks alike.
    """
    decision: list[Result | None] = [all_or_none(decide, on=dist.get_rank() == 0)]
    dist.broadcast_object_list(decision, src=0, group=host_group())
    return cast("Result", decision[0])


def refuse_other_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a job whose ranks were started with different settings; all ranks call this.

    A launcher starts each machine with a command line of its own, and a sweep may propose other values to each: ranks
    that go by different learning rates would train without a word.

    Raises:
        DpoCacheError: Naming each setting of a rank that is not rank 0's; on all ranks alike.
    """
    first = decided_by_first(lambda: dict(settings))

    def compare() -> None:
        different = [
            f"{name} is {settings[name]!r} and rank 0 has {value!r}"
            for name, value in first.items()
            if settings[name] != value
        ]
        if different:
            raise DpoCacheError(
                f"rank {dist.get_rank()} was started with other settings: {'; '.join(different)}",
                expected="the same command on all machines",
                next_step="let one process propose the values and the launcher hand them to all ranks",
            )

    all_or_none(compare)


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is so on some rank."""
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def say_once(message: str) -> None:
    """Say it, on rank 0 alone."""
    if dist.get_rank() == 0:
        say(message)


def prepare_deepspeed() -> None:
    """Quiet it, and keep it from compiling what nobody here calls.

    Its notes at level INFO, and torch's about calls that DeepSpeed makes, are not for people who train. Its operator
    over shared memory serves inference alone, and would need a C++ compiler at the first start on a CPU.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*torch\.distributed.* is deprecated", category=FutureWarning)
    # peft and DeepSpeed ask transformers by a name that it has renamed.
    warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.* is deprecated", category=FutureWarning)

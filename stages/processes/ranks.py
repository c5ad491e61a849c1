"""Which of how many: what torchrun, the deepspeed launcher, srun or our own launcher told this process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import DpoCacheError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The place of one process among those of its job.

    Attributes:
        rank: Which process of the job this is.
        num_ranks: How many the job has.
        rank_of_node: Which process of this machine it is; also which GPU it uses.
        ranks_per_node: How many processes this machine has.
    """

    rank: int
    num_ranks: int
    rank_of_node: int
    ranks_per_node: int


def ranks_from_environment(environment: Mapping[str, str] | None = None) -> Ranks | None:
    """Read a launcher's variables; None where no launcher started this process.

    torchrun, the deepspeed launcher and our own set ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``; srun sets
    ``SLURM_PROCID``, ``SLURM_LOCALID`` and ``SLURM_NTASKS``. An ``salloc`` or ``sbatch`` shell carries SLURM
    variables too, but only a task that srun started has a step (``SLURM_STEP_ID``), and one task alone is no
    job of ranks.

    Raises:
        DpoCacheError: Some of a launcher's variables are set and others are missing, or mpirun started this process.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return Ranks(
            rank=_number(environment, "RANK"),
            num_ranks=_number(environment, "WORLD_SIZE"),
            rank_of_node=_number(environment, "LOCAL_RANK"),
            ranks_per_node=_processes_here(environment),
        )
    _refuse_mpirun(environment)
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Ranks(
            rank=_number(environment, "SLURM_PROCID"),
            num_ranks=_number(environment, "SLURM_STEP_NUM_TASKS"),
            rank_of_node=_number(environment, "SLURM_LOCALID"),
            ranks_per_node=_tasks_on_this_node(environment),
        )
    return None


def rendezvous_environment(ranks: Ranks, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables torch.distributed reads, filled in where srun leaves them out.

    srun names no rendezvous: the first node of the step hosts it, on a port derived from the job's number so
    that two jobs on one node do not meet.
    """
    environment = os.environ if environment is None else environment
    filled = {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.rank_of_node),
        "WORLD_SIZE": str(ranks.num_ranks),
        "LOCAL_WORLD_SIZE": str(ranks.ranks_per_node),
    }
    if "MASTER_ADDR" not in environment:
        node_list = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
        filled["MASTER_ADDR"] = first_slurm_node(node_list) if node_list else "127.0.0.1"
    if "MASTER_PORT" not in environment:
        filled["MASTER_PORT"] = str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
    return filled


def first_slurm_node(node_list: str) -> str:
    """The first name of a SLURM node list: ``gpu[007-009,12],login1`` gives ``gpu007``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", node_list)
    assert match is not None, "a SLURM node list is never empty"
    prefix, numbers = match.groups()
    return prefix if numbers is None else prefix + re.split(r"[-,]", numbers)[0]


def _processes_here(environment: Mapping[str, str]) -> int:
    """torchrun calls it ``LOCAL_WORLD_SIZE``, the deepspeed launcher ``LOCAL_SIZE``; without, there is one machine."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return _number(environment, next(name for name in names if name in environment))


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """``SLURM_STEP_TASKS_PER_NODE`` reads like ``8(x4),3``; all that matters is this node's entry."""
    counts: list[int] = []
    for entry in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeats = entry.partition("(x")
        counts += [int(count)] * int(repeats.rstrip(")") or "1" if repeats else "1")
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _refuse_mpirun(environment: Mapping[str, str]) -> None:
    """Each of its processes would take itself for the only one, and all GPUs for its own."""
    started = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if started != "1":
        raise DpoCacheError(
            f"mpirun started {started} of these processes, and says which is which in variables that are not read",
            expected="torchrun, the deepspeed launcher or srun",
            next_step="on one machine leave mpirun out: one command starts a process for each GPU",
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as missing:
        raise DpoCacheError(
            f"a launcher's variable {name} is {environment.get(name)!r}, and RANK is {environment.get('RANK')!r}",
            expected="a number, as torchrun, the deepspeed launcher and srun set it",
            next_step="some clusters set RANK and WORLD_SIZE for their machines: start with torchrun, or for a job on "
            "one machine alone, remove them: env -u RANK -u WORLD_SIZE dpo-train …",
        ) from missing

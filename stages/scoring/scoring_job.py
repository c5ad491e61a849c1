"""Have a plan scored: one process a GPU, units drawn from a shared queue, progress of the whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DpoCacheError
from ..building.build_plan import ScoringPlan
from ..building.left_out import UnusablePair
from ..console.progress import Progress
from ..processes.child_processes import python_command, run_children, threads_for
from ..processes.heartbeat import process_name
from ..processes.job_store import RUN_AGAIN, STORE_FAULTS, JobStore, StoreAddress, store_lost
from ..processes.ranks import Ranks
from .scoring_meter import meter_reading
from .unit_queue import UnitQueue


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringOutcome:
    """What a scoring job did.

    Attributes:
        forwards: Forward passes of the reference.
        tokens: Tokens that went through it, a shared prompt counted once.
        seconds: From the first process to the last.
        forward_seconds: What forward passes took, of all scoring processes together.
        forward_share: Share of the scoring processes' time that forward passes took, from first batch to last.
        shards: Names of the shards that were written.
        unusable: Pairs whose log-probabilities are refused; nothing was written for them.
        faults: What scoring processes that failed had to say; the others did their work.
    """

    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    forward_share: float = 0.0
    shards: tuple[str, ...] = ()
    unusable: tuple[UnusablePair, ...] = ()
    faults: tuple[str, ...] = ()


def lead_scoring(
    job: JobStore, plan: ScoringPlan, plan_path: Path, *, num_workers: int, total_tokens: int
) -> ScoringOutcome:
    """Score all units of a plan.

    Args:
        job: The store; under a launcher this process runs one scoring process and the other ranks one each.
        plan: What to score.
        plan_path: Where it is written for the scoring processes.
        num_workers: Scoring processes to run here, without a launcher.
        total_tokens: Tokens of all units.

    Raises:
        DpoCacheError: Units are left over because the scoring processes failed.
        KeyboardInterrupt: Asked to stop; finished units stay.
    """
    started, ranks = time.monotonic(), job.ranks
    queue = UnitQueue(job.store, len(plan.units))
    job.announce_plan(plan_path)
    ranks_of_node = [ranks.rank_of_node] if ranks else list(range(num_workers))
    if not plan.units:
        ranks_of_node = []  # the other ranks start none either: there is nothing to load a model for
    with Progress(total_tokens, unit="tok", title="score") as progress:

        def show() -> None:
            progress.reach(
                min(total_tokens, queue.add("tokens", 0)),
                pairs=f"{min(plan.num_pairs, queue.add('pairs', 0)):,}/{plan.num_pairs:,}",
                units=f"{queue.num_finished}/{queue.num_units}",
                **meter_reading(queue),
                **({"ranks": f"{job.num_living()}/{ranks.num_ranks}"} if ranks else {}),
            )

        try:
            faults = run_children(
                [_score_command(plan_path, job.address, rank_of_node) for rank_of_node in ranks_of_node],
                [_environment(ranks, rank_of_node, num_workers) for rank_of_node in ranks_of_node],
                survivors_go_on=not plan.zero_stage,  # none can gather weights without the others
                while_waiting=show,
                on_end=lambda pid: queue.declare_dead(process_name(pid)),
            )
        except DpoCacheError as fault:  # the first one ended them all
            raise _unfinished(queue, [str(fault)]) from fault
        job.wait_for_others(while_waiting=show)
    faults += queue.faults()
    faults += [f"rank {rank} was lost" for rank in job.lost_ranks()]
    if queue.num_finished < queue.num_units:
        raise _unfinished(queue, faults)
    return ScoringOutcome(
        forwards=queue.add("forwards", 0),
        tokens=queue.add("tokens", 0),
        seconds=time.monotonic() - started,
        forward_seconds=queue.add("forward_us", 0) / 1e6,
        forward_share=queue.add("forward_us", 0) / max(1, queue.add("turn_us", 0)),
        shards=tuple(queue.finished_shards()),
        unusable=tuple(queue.unusable_pairs()),
        faults=tuple(faults),
    )


def _unfinished(queue: UnitQueue, faults: Sequence[str]) -> DpoCacheError:
    """What a build ends with whose scoring processes have left units."""
    return DpoCacheError(
        "\n".join(faults or ["the scoring processes ended early"])
        + f"\n  {queue.num_finished} of {queue.num_units} units are finished and stay",
        next_step=f"mend that, then {RUN_AGAIN}" if faults else RUN_AGAIN,
    )


def follow_scoring(ranks: Ranks) -> None:
    """What ranks other than 0 do: wait for the plan, run one scoring process, leave when the leader is done.

    Raises:
        DpoCacheError: The leader failed or is gone, or a process without which the others cannot go on.
    """
    try:
        job = JobStore(ranks)
        with job.beating():
            try:
                _follow(job, ranks)
            finally:
                job.leave()
    except STORE_FAULTS as lost:
        raise store_lost() from lost


def _follow(job: JobStore, ranks: Ranks) -> None:
    plan_path = job.wait_for_plan()
    if plan_path is None:
        return
    plan = ScoringPlan.read(plan_path)
    queue = UnitQueue(job.store, len(plan.units))
    if plan.units:
        faults = run_children(
            [_score_command(plan_path, job.address, ranks.rank_of_node)],
            [_environment(ranks, ranks.rank_of_node, ranks.ranks_per_node)],
            survivors_go_on=not plan.zero_stage,
            while_waiting=job.has_ended,  # raises the leader's fault: what is scored here is of no use then
            on_end=lambda pid: queue.declare_dead(process_name(pid)),
        )
        queue.report_faults(faults)  # another rank takes the unit over: no reason to end the job
    job.announce_scored()
    job.wait_for_end()


def _environment(ranks: Ranks | None, rank_of_node: int, processes_here: int) -> dict[str, str]:
    """Threads, and without a launcher the variables that one would have set."""
    if ranks is not None:
        return threads_for(ranks.ranks_per_node)
    names = {"RANK": rank_of_node, "LOCAL_RANK": rank_of_node, "WORLD_SIZE": processes_here}
    return {**threads_for(processes_here), **{name: str(value) for name, value in names.items()}}


def _score_command(plan_path: Path, address: StoreAddress, rank_of_node: int) -> list[str]:
    return python_command("score", str(plan_path), str(address), str(rank_of_node))

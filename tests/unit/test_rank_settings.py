"""What one rank alone has, other settings or a request to stop, all of them hear of."""

from __future__ import annotations

from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes.process_group import any_rank, refuse_other_settings


def faults_with(rates: list[float]) -> list[str]:
    """What this rank hears where each rank has the learning rate of its place, then where all have the first."""
    import torch.distributed as dist

    heard = []
    for rate in (rates[dist.get_rank()], rates[0]):
        try:
            refuse_other_settings({"beta": 5.0, "learning_rate": rate})
            heard.append("")
        except DpoCacheError as fault:
            heard.append(fault.found.splitlines()[0])
    return heard


def test_all_ranks_hear_which_rank_has_another_setting() -> None:
    fault = "rank 1 was started with other settings: learning_rate is 2e-06 and rank 0 has 1e-06"
    assert run_ranks(faults_with, [1e-6, 2e-6], num_ranks=2) == [[fault, ""], [fault, ""]]


def asked_to_stop() -> list[bool]:
    """What this rank hears where the second alone was asked to stop, then where none was."""
    import torch
    import torch.distributed as dist

    return [any_rank(asked, torch.device("cpu")) for asked in (dist.get_rank() == 1, False)]


def test_all_ranks_stop_where_one_was_asked_to() -> None:
    """A scheduler may signal one machine alone; the others would wait for it in their next update."""
    assert run_ranks(asked_to_stop, num_ranks=2) == [[True, False], [True, False]]

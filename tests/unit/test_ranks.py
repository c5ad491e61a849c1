"""Launchers' variables are read as their documentation gives them."""

from __future__ import annotations

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes.ranks import first_slurm_node, ranks_from_environment, rendezvous_environment

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "19",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),3",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008,12]",
    "SLURM_JOB_ID": "4242",
}


def test_no_launcher_means_no_ranks() -> None:
    assert ranks_from_environment({}) is None


def test_a_shell_inside_an_allocation_is_no_rank() -> None:
    assert ranks_from_environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) is None


def test_torchrun_variables_are_taken_as_they_are() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    ranks = ranks_from_environment(environment)
    assert ranks is not None
    assert (ranks.rank, ranks.num_ranks, ranks.rank_of_node, ranks.ranks_per_node) == (3, 4, 1, 2)


def test_the_deepspeed_launcher_has_its_own_name_for_the_processes_of_a_machine() -> None:
    ranks = ranks_from_environment({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"})
    assert ranks is not None
    assert (ranks.rank_of_node, ranks.ranks_per_node) == (1, 8)


def test_half_a_launcher_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(DpoCacheError, match="WORLD_SIZE"):
        ranks_from_environment({"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})


def test_a_cluster_that_numbers_machines_and_not_processes_is_told_what_to_start() -> None:
    """As Kubeflow's PyTorchJob, which leaves the processes of a machine to torchrun."""
    pod = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}
    with pytest.raises(DpoCacheError, match="LOCAL_RANK is None, and RANK is '0'") as refused:
        ranks_from_environment(pod)
    assert "env -u RANK -u WORLD_SIZE" in (refused.value.next_step or "")


def test_processes_of_mpirun_are_refused_before_each_takes_all_gpus() -> None:
    started = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    with pytest.raises(DpoCacheError, match="mpirun started 8 of these processes"):
        ranks_from_environment(started)
    with pytest.raises(DpoCacheError, match="mpirun started 8"):  # itself started by srun, one of it on each node
        ranks_from_environment({**started, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    assert ranks_from_environment({"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_srun_names_the_rank_and_the_tasks_of_its_own_node() -> None:
    ranks = ranks_from_environment(SRUN)
    assert ranks is not None
    assert (ranks.rank, ranks.num_ranks, ranks.rank_of_node, ranks.ranks_per_node) == (17, 19, 1, 3)


def test_under_srun_the_first_node_hosts_the_rendezvous() -> None:
    ranks = ranks_from_environment(SRUN)
    assert ranks is not None
    filled = rendezvous_environment(ranks, SRUN)
    assert filled["MASTER_ADDR"] == "gpu007"
    assert filled["MASTER_PORT"] == str(20000 + 4242)


def test_a_rendezvous_that_is_named_is_left_alone() -> None:
    environment = {"MASTER_ADDR": "host", "MASTER_PORT": "1234", **SRUN}
    ranks = ranks_from_environment(environment)
    assert ranks is not None
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(rendezvous_environment(ranks, environment))


@pytest.mark.parametrize(
    ("node_list", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3-9]", "n3"), ("n[03,07]", "n03"), ("a1,b[1-2]", "a1")],
)
def test_the_first_node_of_a_slurm_list(node_list: str, first: str) -> None:
    assert first_slurm_node(node_list) == first

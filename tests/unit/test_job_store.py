"""The ranks of a build hear of each other's end, however it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from distributed_run import free_port
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes import heartbeat, job_store
from dpo_cache.stages.processes.job_store import JobStore, StoreAddress
from dpo_cache.stages.processes.ranks import Ranks


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 0.5)
    monkeypatch.setattr(job_store, "POLL_S", 0.02)
    monkeypatch.setattr(job_store, "LEADER_PATIENCE", 1.0)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], JobStore]:
    """The store of a job of two ranks, as one of them holds it; rank 0 hosts it and has to come first."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return lambda rank: JobStore(Ranks(rank=rank, num_ranks=2, rank_of_node=rank, ranks_per_node=2))


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread."""
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def test_a_following_rank_waits_for_a_leader_that_lives_and_leaves_when_the_mixture_is_written(
    job: Callable[[int], JobStore],
) -> None:
    leader, follower = job(0), job(1)

    def lead() -> None:
        with leader.beating():
            time.sleep(1.2)  # more than twice as long as a heart may stand still
            leader.announce_end()

    with meanwhile(lead):
        follower.wait_for_end()
        follower.leave()


@pytest.mark.parametrize("wait", [JobStore.wait_for_plan, JobStore.wait_for_end])
def test_a_following_rank_whose_leader_died_says_so_and_how_to_go_on(
    job: Callable[[int], JobStore], wait: Callable[[JobStore], object]
) -> None:
    leader, follower = job(0), job(1)
    with leader.beating():
        time.sleep(0.1)
    with pytest.raises(DpoCacheError, match=r"rank 0, .* is gone") as lost:
        wait(follower)
    assert "run the same command again: what is finished stays" in str(lost.value)


def test_a_leaders_fault_ends_following_ranks_while_they_wait_and_while_they_score(
    job: Callable[[int], JobStore],
) -> None:
    leader, follower = job(0), job(1)
    assert not follower.has_ended()
    leader.store.set("ended", "rank 0 ended: no room on the disk")
    for waiting in (follower.wait_for_plan, follower.wait_for_end, follower.has_ended):
        with pytest.raises(DpoCacheError, match="no room on the disk"):
            waiting()


def test_a_build_that_ends_without_a_plan_lets_following_ranks_go(job: Callable[[int], JobStore]) -> None:
    leader, follower = job(0), job(1)
    leader.store.set("ended", "")
    assert follower.wait_for_plan() is None


def test_a_machine_that_does_not_see_the_cache_folder_says_so_instead_of_scoring(
    job: Callable[[int], JobStore], tmp_path: Path
) -> None:
    leader, follower = job(0), job(1)
    plan = tmp_path / "plan.json"
    leader.announce_plan(plan)
    with pytest.raises(DpoCacheError, match=r"this machine does not see .*plan\.json, which rank 0 wrote") as unseen:
        follower.wait_for_plan()
    assert "dpo-cache merge" in str(unseen.value)
    plan.touch()
    assert follower.wait_for_plan() == plan


def test_a_leader_waits_for_ranks_that_score_and_not_for_dead_ones(
    job: Callable[[int], JobStore], tmp_path: Path
) -> None:
    leader, follower = job(0), job(1)

    def score() -> None:
        with follower.beating():
            time.sleep(1.2)
            follower.announce_scored()
            follower.leave()

    with meanwhile(score):
        leader.wait_for_others()
        assert leader.lost_ranks() == []

    follower.store.delete_key("scored/1")
    follower.store.delete_key("left/1")
    leader.wait_for_others()
    assert leader.lost_ranks() == [1]


def test_a_rank_that_starts_late_is_waited_for_and_counts_only_once_it_lives(
    job: Callable[[int], JobStore], tmp_path: Path
) -> None:
    leader, living, plan = job(0), [], tmp_path / "plan.json"
    plan.touch()
    leader.announce_plan(plan)

    def come_late() -> None:
        time.sleep(1.2)  # more than twice as long as a heart that beats may stand still
        follower = job(1)
        with follower.beating():
            assert follower.wait_for_plan() == plan
            time.sleep(0.3)
            follower.announce_scored()
            follower.wait_for_end()
            follower.leave()

    with meanwhile(come_late):
        leader.wait_for_others(while_waiting=lambda: living.append(leader.num_living()))
        assert leader.lost_ranks() == []
        leader.announce_end()
    assert living[0] == 1
    assert living[-1] == 2


def test_a_rank_that_comes_when_the_build_is_finished_learns_that_and_looks_for_no_plan(
    job: Callable[[int], JobStore], tmp_path: Path
) -> None:
    leader, plans = job(0), []
    leader.announce_plan(tmp_path / "a plan whose build has removed it")

    def come_late() -> None:
        time.sleep(1.2)
        follower = job(1)
        with follower.beating():
            plans.append(follower.wait_for_plan())
            follower.leave()

    with meanwhile(come_late):
        leader.announce_end()
    assert plans == [None]
    assert leader.store.check(["left/1"])


def test_ranks_that_never_come_are_given_up_together_after_the_time_to_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job_store, "CONNECT_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    leader = JobStore(Ranks(rank=0, num_ranks=3, rank_of_node=0, ranks_per_node=3))
    leader.wait_for_others()
    assert leader.lost_ranks() == [1, 2]
    monkeypatch.setattr(job_store, "POLL_S", 1e6)  # nobody is left to wait for
    leader.announce_end()


def test_a_rank_that_nobody_answers_says_where_it_looked_and_prints_no_stack(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_store, "CONNECT_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(DpoCacheError, match=r"does not answer at 127\.0\.0\.1:\d+: .*refused") as fault:
        StoreAddress(host="127.0.0.1", port=free_port()).connect()
    assert "run the same command again" in str(fault.value)
    assert capfd.readouterr().err == ""


def test_looking_whether_a_store_is_there_disturbs_nobody(
    job: Callable[[int], JobStore], capfd: pytest.CaptureFixture[str]
) -> None:
    leader, follower = job(0), job(1)
    follower.leave()
    assert leader.store.check(["left/1"])
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_named(job: Callable[[int], JobStore]) -> None:
    held = job(0)
    with pytest.raises(DpoCacheError, match=r"cannot listen on 127\.0\.0\.1"):
        job(0)
    del held

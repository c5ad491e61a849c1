"""What the ranks of a job need of a machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from distributed_run import free_port
from dpo_cache.stages.processes.rendezvous import hosted_rendezvous

JOIN = """
from dpo_cache.stages.processes.process_group import process_group
from dpo_cache.stages.processes.ranks import Ranks

with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)) as device:
    print(device)
"""

MEET = """
from datetime import timedelta
from dpo_cache.cli_output import command_run
from dpo_cache.stages.processes import process_group
from dpo_cache.stages.processes.ranks import ranks_from_environment

process_group.TIMEOUT = timedelta(seconds={timeout_s})
with command_run(), process_group.process_group(ranks_from_environment()):
    pass
"""

FAIL = """
import json
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes.process_group import all_or_none, process_group
from dpo_cache.stages.processes.ranks import Ranks

def fail():
    raise DpoCacheError("no", expected="yes", next_step="say yes")

with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)):
    try:
        all_or_none(fail)
    except DpoCacheError as fault:
        print(json.dumps(fault.to_json()))
"""


def join(environment: dict[str, str], *, code: str = JOIN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_ranks_meet_on_a_machine_without_a_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = join({"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "cpu"
    assert not list(empty.iterdir()), "something was compiled"


def test_a_fault_of_one_rank_keeps_its_parts_on_all() -> None:
    done = join({}, code=FAIL)
    assert json.loads(done.stdout.splitlines()[-1]) == {"found": "no", "expected": "yes", "next_step": "say yes"}


def test_a_rank_that_is_alone_needs_no_port_that_another_run_has() -> None:
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        done = join({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other_run.getsockname()[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "cpu"


def rank_0_of_2(port: int) -> dict[str, str]:
    return {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def test_ranks_that_do_not_meet_are_a_fault_that_names_the_place() -> None:
    """As where a variable RANK is left over in a shell, or the port belongs to another job."""
    port = free_port()
    with socket.socket() as other_job:
        other_job.bind(("0.0.0.0", 0))
        other_job.listen()
        taken: int = other_job.getsockname()[1]
        for place, why in ((port, "1/2 clients joined"), (taken, "EADDRINUSE")):
            apart = join(rank_0_of_2(place), code=MEET.format(timeout_s=1))
            assert apart.returncode == 1
            assert f"rank 0 of 2 meets the others at 127.0.0.1:{place}\n" in apart.stderr
            assert f"Error: rank 0 of 2 did not meet the others at 127.0.0.1:{place}: " in apart.stderr
            assert why in apart.stderr
            assert "env -u RANK -u WORLD_SIZE" in apart.stderr
            assert "Traceback" not in apart.stderr


def test_a_rank_that_waits_for_the_others_can_be_stopped() -> None:
    waiting = subprocess.Popen(
        [sys.executable, "-c", MEET.format(timeout_s=3600)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", **rank_0_of_2(free_port())},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    while "meets the others" not in (line := waiting.stderr.readline()):
        assert line, "it never began to wait"
    time.sleep(0.5)  # before, it could be stopped anyway
    waiting.terminate()
    assert waiting.wait(timeout=60) in (1, -signal.SIGTERM)


def test_a_rendezvous_has_its_port_before_any_rank_is_told_of_it() -> None:
    with hosted_rendezvous() as one, hosted_rendezvous() as other:
        assert one["MASTER_PORT"] != other["MASTER_PORT"]
        for rendezvous in (one, other):
            with socket.create_connection((rendezvous["MASTER_ADDR"], int(rendezvous["MASTER_PORT"])), timeout=10):
                pass

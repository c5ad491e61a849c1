"""What the ranks of a job need of a machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from dpo_cache.stages.processes.rendezvous import hosted_rendezvous

JOIN = """
from dpo_cache.stages.processes.process_group import process_group
from dpo_cache.stages.processes.ranks import Ranks

with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)) as device:
    print(device)
"""


def join(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOIN],
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


def test_a_rank_that_is_alone_needs_no_port_that_another_run_has() -> None:
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        done = join({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other_run.getsockname()[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "cpu"


def test_a_rendezvous_has_its_port_before_any_rank_is_told_of_it() -> None:
    with hosted_rendezvous() as one, hosted_rendezvous() as other:
        assert one["MASTER_PORT"] != other["MASTER_PORT"]
        for rendezvous in (one, other):
            with socket.create_connection((rendezvous["MASTER_ADDR"], int(rendezvous["MASTER_PORT"])), timeout=10):
                pass

"""What the ranks of a job need of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

JOIN = """
from dpo_cache.stages.processes.process_group import process_group
from dpo_cache.stages.processes.ranks import Ranks

with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)) as device:
    print(device)
"""


def test_ranks_meet_on_a_machine_without_a_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "cpu"
    assert not list(empty.iterdir()), "something was compiled"

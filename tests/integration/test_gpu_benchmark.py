"""The benchmark of GPUs, with a model that a CPU can run: when a GPU is lent, there is no time to mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_gpus_runs_to_its_table(tmp_path: Path) -> None:
    shapes = ("--score", "tiny", "--train", "tiny", "tiny-lora", "--no-keep")
    sizes = ("--pairs", "6", "--max-seq-length", "128", "--tokens-per-microbatch", "256", "--matmul-size", "64")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *shapes, *sizes], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    table = done.stdout[done.stdout.index("| what |") :]
    assert [line for line in table.splitlines() if line.startswith("| train tiny-lora: ")]
    assert "out of memory" not in table

"""The benchmark of GPUs, with a model that a CPU can run: on a GPU there is no time to mend it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_gpus_runs_to_its_table(tmp_path: Path) -> None:
    what = ("--what", "score-tiny", "train-lora-tiny", "train-tiny", "--no-keep")
    pairs = ("--score-pairs", "6", "--train-pairs", "4", "--repeats", "1", "--max-seq-length", "128")
    sizes = ("--tokens-per-microbatch", "256", "--matmul-size", "64")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *what, *pairs, *sizes],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    headings = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert [heading.split(", ")[2] for heading in headings] == [
        *("TINY scored", "TINY trained with LoRA", "TINY trained in full")
    ]
    assert done.stdout.count("| … without a shared prefix: ") == len(headings)
    assert "out of memory" not in done.stdout

"""The benchmark of GPUs, with a model that a CPU can run: on a GPU there is no time to mend it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SIZES = (
    *("--no-keep", "--score-pairs", "6", "--train-pairs", "4", "--max-seq-length", "128"),
    *("--tokens-per-microbatch", "256", "--matmul-size", "64"),
)


def command(*options: str) -> list[str]:
    return [sys.executable, str(BENCHMARK), *SIZES, *options]


def printed(*options: str) -> str:
    """What it prints."""
    done = subprocess.run(command(*options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "out of memory" not in done.stdout
    return done.stdout


FULL = """
import gc, runpy, sys, weakref
import torch
from dpo_cache.pipeline.training.policy_engine import PolicyEngine

weights = []

def run_out(engine, *_, **__):
    gc.collect()
    assert not [weight for weight in weights if weight() is not None], "those of the way before are still held"
    weights.extend(map(weakref.ref, engine.parameters()))
    raise torch.OutOfMemoryError("CUDA out of memory")

PolicyEngine.micro_step = run_out
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_way_that_runs_out_of_memory_leaves_all_of_it_to_the_next() -> None:
    found = subprocess.run(
        [sys.executable, "-c", FULL, *command("--what", "train-tiny")[1:]], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.count("| out of memory |") == 5


def _imports(interpreter: str) -> bool:
    code = "import peft, trl"
    return subprocess.run([interpreter, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_benchmark_of_gpus_runs_to_its_tables() -> None:
    found = printed("--what", "score-tiny", "train-lora-tiny", "train-tiny", "--repeats", "1")
    headings = [line for line in found.splitlines() if line.startswith("## ")]
    assert [heading.split(", ")[2] for heading in headings] == [
        *("TINY scored", "TINY trained with LoRA", "TINY trained in full")
    ]
    assert found.count("| … without a shared prefix: ") == len(headings)


def test_trl_scores_and_trains_beside_it() -> None:
    interpreter = os.environ.get("DPO_CACHE_TRL_PYTHON")
    if not interpreter or not _imports(interpreter):
        pytest.skip("DPO_CACHE_TRL_PYTHON does not name an interpreter with TRL and peft")
    options = ("--trl-python", interpreter, "--trl-batch-sizes", "2", "--repeats", "1")
    found = printed("--what", "score-tiny", "train-lora-tiny", *options)
    rates = [float(line.split(" | ")[1]) for line in found.splitlines() if line.startswith("| TRL ")]
    assert len(rates) == 2
    assert min(rates) > 0


def test_an_update_of_trl_holds_all_pairs_or_is_refused() -> None:
    done = subprocess.run(
        command("--trl-python", sys.executable, "--trl-batch-sizes", "3"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--train-pairs has to be a multiple" in done.stderr


def test_a_time_limit_keeps_the_rows_that_were_measured() -> None:
    running = subprocess.Popen(
        command("--what", "score-tiny", "--repeats", "20"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    for line in running.stderr:
        if " | " in line:  # the first row
            running.terminate()
            break
    found, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "| prefix-shared, sdpa |" in found
    assert "| … with all logits at once |" not in found

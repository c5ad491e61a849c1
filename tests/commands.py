"""Run the real commands as real processes, and read what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dpo_cache.__main__ import main
from forked_process import ON_A_CPU, start_forked

TIMEOUT_S = 300


def dpo_cache(*arguments: str | Path | int | float) -> list[str]:
    """``dpo-cache …`` with this interpreter."""
    return [sys.executable, "-m", "dpo_cache", *map(str, arguments)]


def dpo_train(*arguments: str | Path | int | float) -> list[str]:
    """``dpo-train …`` with this interpreter."""
    return dpo_cache("train", *arguments)


def ended(command: list[str], *, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is.

    Args:
        command: From :func:`dpo_cache` or :func:`dpo_train`, which begins with its imports made; or any other.
        environment: Variables to set beside those of this process. A library may read them while it is imported: with
            others than those of ``ON_A_CPU`` the process begins with nothing, as it does on a machine with a GPU.
    """
    environment = environment or {}
    variables = {**os.environ, **environment}
    is_forked = command[:3] == dpo_cache() and environment.items() <= ON_A_CPU.items()
    if not is_forked or torch.cuda.is_available():
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=variables)
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start_forked(main, command[3:], environment=variables, stdout=stdout, stderr=stderr)
        process.join(TIMEOUT_S)
        process.kill()  # where it has not ended
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())


def run(command: list[str], *, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command to its end and return its ``--json`` report."""
    done = ended([*command, "--json"], environment=environment)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def fails(command: list[str]) -> str:
    """Run a command that is to fail with a message, and return the message."""
    done = ended(command)
    assert done.returncode == 1, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.stderr[done.stderr.rindex("Error: ") :]


def kill_when(command: list[str], condition: Callable[[], bool], *, interval_s: float = 0.01) -> bool:
    """Start a command and kill it with SIGKILL once the condition holds; False if it ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        assert time.monotonic() < deadline, "the condition never held"
        if condition():
            process.kill()
            process.wait()
            return True
        time.sleep(interval_s)
    return False


def shard_rows(cache: Path) -> pa.Table:
    """All rows of a cache, read with pyarrow alone."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((cache / "shards").glob("*.parquet")))


def logps_by_key(cache: Path) -> dict[bytes, tuple[float, float]]:
    """Key to (chosen, rejected) of all rows; no key stands twice."""
    rows = shard_rows(cache)
    keys, chosen, rejected = (
        rows.column(name).to_pylist() for name in ("example_key", "ref_chosen_logps", "ref_rejected_logps")
    )
    values = {key: (one, other) for key, one, other in zip(keys, chosen, rejected, strict=True)}
    assert len(values) == len(keys), "a key stands in two rows"
    return values


def assert_same_logps(
    ours: dict[bytes, tuple[float, float]], theirs: dict[bytes, tuple[float, float]], *, relative: float
) -> None:
    """The same keys, and values that agree."""
    assert ours.keys() == theirs.keys()
    keys = sorted(ours)
    np.testing.assert_allclose([ours[key] for key in keys], [theirs[key] for key in keys], rtol=relative, atol=0)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, evaluations left out."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "train_loss" in line]

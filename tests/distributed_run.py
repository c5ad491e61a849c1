"""Run a function of a test file on several real processes that talk over gloo."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(function: Callable[..., Any], *args: Any, num_ranks: int, timeout_s: float = 240) -> list[Any]:
    """Call ``function(*args)`` on ``num_ranks`` processes and return what each of them returned.

    Args:
        function: Top-level function of a file; found again in each process by file and name. ``torch.distributed``
            is initialised when it is called.
        args: JSON values.
        num_ranks: Number of processes.
        timeout_s: After this all of them are killed.

    Raises:
        AssertionError: A process failed or took too long; the message holds what all of them printed.
    """
    file = inspect.getsourcefile(function)
    assert file is not None
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _start(Path(folder), file, function.__name__, args, rank=rank, num_ranks=num_ranks, port=port)
            for port in [free_port()]
            for rank in range(num_ranks)
        ]
        results = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(_has_failed(process, result) for process, result in zip(processes, results, strict=True)):
                time.sleep(1)  # the others may be about to say more
                break
            time.sleep(0.05)
        failed = [
            rank
            for rank, (process, result) in enumerate(zip(processes, results, strict=True))
            if process.poll() is None or _has_failed(process, result)
        ]
        for process in processes:
            process.kill()
            process.wait()
        logs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(num_ranks)]
        shown = "\n".join(f"--- rank {rank}\n{log[-6000:]}" for rank, log in enumerate(logs))
        assert not failed, f"ranks {failed} failed or ran longer than {timeout_s} s\n{shown}"
        return [json.loads(result.read_text()) for result in results]


def _has_failed(process: subprocess.Popen[bytes], result: Path) -> bool:
    """Once in thousands of runs gloo aborts a process that has left its result and is ending: that is no failure."""
    code = process.poll()
    return code not in (None, 0) and not (code == -signal.SIGABRT and result.exists())


def _start(
    folder: Path, file: str, function: str, args: tuple[Any, ...], *, rank: int, num_ranks: int, port: int
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, file, function, json.dumps(args), str(folder / f"{rank}.json")],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(file: str, function: str, args: str, result: str) -> None:
    """One rank: import the test file, call the function, leave its result."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, function)(*json.loads(args))
    dist.barrier()
    unfinished = Path(f"{result}.tmp")
    unfinished.write_text(json.dumps(value))
    unfinished.rename(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])

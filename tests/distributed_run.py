"""Run a function of a test file on several real processes that talk over gloo."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forked_process import ON_A_CPU, start_forked


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
        results = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        port = free_port()
        processes = [
            _start(file, function.__name__, args, result, rank=rank, num_ranks=num_ranks, port=port)
            for rank, result in enumerate(results)
        ]
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(map(_has_failed, processes, results)):
                time.sleep(1)  # the others may be about to say more
                break
            time.sleep(0.05)
        failed = [
            rank
            for rank, (process, result) in enumerate(zip(processes, results, strict=True))
            if process.is_alive() or _has_failed(process, result)
        ]
        for process in processes:
            process.kill()
            process.join()
        logs = [result.with_suffix(".log").read_text(errors="replace") for result in results]
        shown = "\n".join(f"--- rank {rank}\n{log[-6000:]}" for rank, log in enumerate(logs))
        assert not failed, f"ranks {failed} failed or ran longer than {timeout_s} s\n{shown}"
        return [json.loads(result.read_text()) for result in results]


def _has_failed(process: ForkServerProcess, result: Path) -> bool:
    """Once in thousands of runs gloo aborts a process that has left its result and is ending: that is no failure."""
    return process.exitcode not in (None, 0) and not (process.exitcode == -signal.SIGABRT and result.exists())


def _start(
    file: str, function: str, args: tuple[Any, ...], result: Path, *, rank: int, num_ranks: int, port: int
) -> ForkServerProcess:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **ON_A_CPU, **{name: str(value) for name, value in place.items()}}
    log = result.with_suffix(".log")
    return start_forked(_rank, file, function, args, result, environment=environment, stdout=log, stderr=log)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(file: str, function: str, args: tuple[Any, ...], result: Path) -> None:
    """One rank: import the test file, call the function, leave its result."""
    import torch.distributed as dist
    from dpo_cache.stages.processes.process_group import prepare_deepspeed

    prepare_deepspeed()
    dist.init_process_group("gloo")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, function)(*args)
    dist.barrier()
    unfinished = result.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value))
    unfinished.rename(result)
    dist.destroy_process_group()

"""Processes that begin with the imports already made, which take seconds and are not what a test is about.

One process imports what most tests need and is forked for each that is asked for, and for each child that a command
among these starts. Nothing but modules is shared.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from dpo_cache.__main__ import main
from dpo_cache.stages.processes import child_processes

IMPORTED = [
    "deepspeed.runtime.zero.stage3",
    "dpo_cache.stages.build",
    "dpo_cache.stages.scoring.score",
    "dpo_cache.stages.train",
    "training_factory",
]
ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""Read while DeepSpeed and torch are imported."""


def start_forked(
    function: Callable[..., None], *args: Any, environment: Mapping[str, str], stdout: Path, stderr: Path
) -> ForkServerProcess:
    """Call a function in a process of its own.

    Args:
        function: Top-level function of a module.
        args: What can be pickled.
        environment: All of its variables. What libraries read while they are imported has no effect.
        stdout, stderr: Files for what it prints; may be one.
    """
    process = _prepared().Process(target=_call, args=(function, args, dict(environment), stdout, stderr))
    process.start()
    return process


@contextmanager
def forked_children() -> Iterator[None]:
    """Meanwhile the processes that a command starts in this one are forked too."""
    with mock.patch.object(child_processes, "_start", _start_child):
        yield


class ForkedChild:
    """What :mod:`child_processes` uses of a ``subprocess.Popen``."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        self._process.join()


def _start_child(
    command: Sequence[str], environment: Mapping[str, str], fault_file: Path, *, log: Path | None = None
) -> child_processes.Child:
    """In place of ``child_processes._start``.

    The child's parent is the process that forks them all, so the kernel cannot end the two together; tests that kill
    a command start it from nothing.
    """
    python = child_processes.python_command()
    assert list(command[: len(python)]) == python
    output = log or Path(f"/proc/{os.getpid()}/fd/{sys.stderr.fileno()}")
    process = start_forked(
        _in_new_session,
        list(command[len(python) :]),
        environment={**os.environ, **environment, child_processes.FAULT_FILE: str(fault_file)},
        stdout=output,
        stderr=output,
    )
    return child_processes.Child(process=ForkedChild(process), fault_file=fault_file)  # type: ignore[arg-type]


def _in_new_session(arguments: list[str]) -> None:
    os.setsid()
    main(arguments)


@cache
def _prepared() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_address is None:
        context.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, ON_A_CPU):
            server.ensure_running()
    else:  # in a forked process, which would otherwise start a server of its own
        server.ensure_running = lambda: None
    return context


def _call(
    function: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], stdout: Path, stderr: Path
) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    # New ones: whether what they write to can be sought in was found out for the server's.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    with forked_children():
        function(*args)

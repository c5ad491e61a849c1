"""Start the processes of a stage on this machine, and never leave one behind.

A child dies with its parent, whatever killed the parent (the kernel sees to it), is asked to stop when the
parent is, and takes its siblings with it when it fails: a rank whose peers are gone would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DpoCacheError
from .stop_request import stop_requests

PR_SET_PDEATHSIG = 1
POLL_S = 0.1
GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A started process, and where it leaves the message of a fault."""

    process: subprocess.Popen[bytes]
    fault_file: Path


def run_children(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    survivors_go_on: bool = False,
    grace_s: float = GRACE_S,
    while_waiting: Callable[[], None] = lambda: None,
    on_end: Callable[[int], None] = lambda _pid: None,
) -> list[str]:
    """Run the commands side by side until all have ended.

    Args:
        commands: One command a child.
        environments: Variables to set for each child, beside those of this process.
        survivors_go_on: Whether the others go on when a child fails; if not, they are stopped.
        grace_s: How long children that are asked to stop may take before they are killed.
        while_waiting: Called several times a second: progress.
        on_end: Told the process id of each child that has ended, well or not, while others go on.

    Returns:
        What the children that failed had to say, each message once; empty where all ended well.

    Raises:
        DpoCacheError: A child failed and the others do not go on.
        KeyboardInterrupt: This process was asked to stop (Ctrl-C or SIGTERM) and the children have stopped.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as folder, stop_requests() as stop_requested:
        children = [
            _start(command, environment, Path(folder) / f"fault-{number}")
            for number, (command, environment) in enumerate(zip(commands, environments, strict=True))
        ]
        running = list(children)
        try:
            while any(child.process.poll() is None for child in children) and not stop_requested():
                if not survivors_go_on and any(child.process.poll() for child in children):
                    break
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    on_end(child.process.pid)
                while_waiting()
                time.sleep(POLL_S)
        finally:
            _stop_all(children, grace_s)
        while_waiting()
        faults = _faults(children)
        if stop_requested():
            raise KeyboardInterrupt
        if faults and not survivors_go_on:
            raise DpoCacheError("\n".join(faults))
        return faults


def is_child() -> bool:
    """Whether :func:`run_children` started this process; then its parent reports."""
    return "DPO_CACHE_FAULT_FILE" in os.environ


def python_command(*arguments: str) -> list[str]:
    """This interpreter running this package's command line."""
    return [sys.executable, "-m", __package__.rpartition(".")[0], *arguments]


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def threads_for(num_processes: int) -> dict[str, str]:
    """Share the cores among CPU processes: without this each would take them all."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, cores // num_processes))}


def die_with_parent() -> None:
    """Called first thing in a child: ask the kernel for SIGKILL when the process that started it is gone."""
    parent = os.environ.pop("DPO_CACHE_PARENT", None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above took effect
        os._exit(1)


def _start(command: Sequence[str], environment: Mapping[str, str], fault_file: Path) -> Child:
    ours = {"DPO_CACHE_FAULT_FILE": str(fault_file), "DPO_CACHE_PARENT": str(os.getpid())}
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment, **ours},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,  # stdout belongs to the parent's report
        start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
    )
    return Child(process=process, fault_file=fault_file)


def _stop_all(children: Sequence[Child], grace_s: float) -> None:
    """Ask, wait, insist. Once one has failed, the others can only wait for it: they get the usual grace at most."""
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    while any(child.process.poll() is None for child in children):
        has_failure = any(child.process.poll() for child in children)
        if time.monotonic() - asked > (min(grace_s, GRACE_S) if has_failure else grace_s):
            break
        time.sleep(POLL_S)
    for child in children:
        child.process.kill()
        child.process.wait()


def _faults(children: Sequence[Child]) -> list[str]:
    """What went wrong, each message once. Children stopped because of another's fault have nothing to say."""
    explained = [child.fault_file.read_text("utf-8") for child in children if child.fault_file.exists()]
    if explained:
        return list(dict.fromkeys(text.removeprefix("Error: ") for text in explained))
    failed = [child.process.returncode for child in children if child.process.returncode != 0]
    return [f"a process of this job ended with {_how(code)}; its own output is above" for code in failed[:1]]


def _how(return_code: int) -> str:
    return f"exit code {return_code}" if return_code > 0 else signal.Signals(-return_code).name

"""Start the processes of a stage on this machine, and never leave one behind.

A child dies with its parent, whatever killed the parent (the kernel sees to it), is asked to stop when the
parent is, and takes its siblings with it when it fails: a rank whose peers are gone would wait for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DpoCacheError
from .stop_request import stop_requests

PR_SET_PDEATHSIG = 1
POLL_S = 0.1
GRACE_S = 30.0
EXPLANATION_S = 10.0
"""How long a child may take to say why it failed, once another has failed without a word."""
FAULT_FILE = "DPO_CACHE_FAULT_FILE"
"""Variable that names the file in which a child leaves a fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A started process, and where it leaves a fault."""

    process: subprocess.Popen[bytes]
    fault_file: Path


def run_children(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    survivors_go_on: bool = False,
    grace_s: float = GRACE_S,
    while_waiting: Callable[[], object] = lambda: None,
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
        KeyboardInterrupt: This process was asked to stop and the children have stopped.
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
            failed = _failed_by_themselves(children, stop_requested)
        finally:
            _stop_all(children, grace_s, grace_after_failure_s=min(grace_s, GRACE_S))
        while_waiting()
        faults = _faults(failed)
        if stop_requested():
            raise KeyboardInterrupt
        if faults and not survivors_go_on:
            raise faults[0] if len(faults) == 1 else DpoCacheError("\n".join(map(str, faults)))
        return [str(fault) for fault in faults]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A process that has nothing to do with the others.

    Attributes:
        name: How messages call it.
        command: What to run.
        log: File that its output is appended to.
    """

    name: str
    command: Sequence[str]
    log: Path


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[Mapping[str, str]],
    *,
    grace_s: float,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job, str | None], None],
) -> None:
    """Run jobs, as many at a time as there are places; one that fails leaves the others alone.

    Args:
        jobs: In the order in which they start.
        places: For each place the variables of the process that runs there, such as its GPUs.
        grace_s: How long jobs that are asked to stop may take before they are killed.
        on_start: Told each job that starts.
        on_end: Told each job that has ended and its fault; None if it ended well or was stopped with this process.

    Raises:
        KeyboardInterrupt: This process was asked to stop and the jobs have stopped.
    """
    waiting, free = deque(jobs), list(places)
    running: list[tuple[Job, Child, Mapping[str, str]]] = []
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as folder, stop_requests() as stop_requested:
        try:
            while (waiting or running) and not stop_requested():
                while waiting and free:
                    job, place = waiting.popleft(), free.pop(0)
                    on_start(job)
                    child = _start(job.command, place, Path(folder) / f"fault-{len(waiting)}", log=job.log)
                    running.append((job, child, place))
                for ended in [one for one in running if one[1].process.poll() is not None]:
                    running.remove(ended)
                    job, child, place = ended
                    free.append(place)
                    on_end(job, _fault_of(job, child))
                time.sleep(POLL_S)
        finally:
            _stop_all([child for _, child, _ in running], grace_s, grace_after_failure_s=grace_s)
        if stop_requested():
            for job, _, _ in running:
                on_end(job, None)
            raise KeyboardInterrupt


def is_child() -> bool:
    """Whether :func:`run_children` started this process; then its parent reports."""
    return FAULT_FILE in os.environ


def leave_fault(fault: DpoCacheError) -> bool:
    """Leave a fault to the parent, which tells that of several children once.

    Returns:
        Whether there is such a parent, and it can read of the fault.
    """
    if not is_child():
        return False
    try:
        Path(os.environ[FAULT_FILE]).write_text(json.dumps(fault.to_json()), encoding="utf-8")
    except FileNotFoundError:  # the folder went with a parent that no longer listens
        return True
    except OSError:  # a full disk, of which the fault may be
        return False
    return True


def python_command(*arguments: str) -> list[str]:
    """This interpreter running this package's command line.

    ``-P`` keeps the current folder out of it, as it is out of the console script that the user started: a file
    ``tokenize.py`` there is no module of Python's.
    """
    return [sys.executable, "-P", "-m", __package__.partition(".")[0], *arguments]


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


def _start(
    command: Sequence[str], environment: Mapping[str, str], fault_file: Path, *, log: Path | None = None
) -> Child:
    ours = {FAULT_FILE: str(fault_file), "DPO_CACHE_PARENT": str(os.getpid())}
    with contextlib.ExitStack() as opened:
        output = opened.enter_context(log.open("ab")) if log else None
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, **ours},
            stdin=subprocess.DEVNULL,
            stdout=output or sys.stderr,  # stdout belongs to the parent's report
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
        )
    return Child(process=process, fault_file=fault_file)


def _failed_by_themselves(children: Sequence[Child], stop_requested: Callable[[], bool]) -> list[Child]:
    """The children that failed before any was stopped.

    Where none of them says why, the others get a moment: a rank also fails because of one that it waits for, and may
    be the quicker of the two to end.
    """
    deadline = time.monotonic() + EXPLANATION_S
    while True:
        all_ended = all([child.process.poll() is not None for child in children])
        failed = [child for child in children if child.process.returncode]
        says_why = any(child.process.returncode < 0 or child.fault_file.exists() for child in failed)
        if all_ended or not failed or says_why or stop_requested() or time.monotonic() > deadline:
            return failed
        time.sleep(POLL_S)


def _stop_all(children: Sequence[Child], grace_s: float, *, grace_after_failure_s: float) -> None:
    """Ask, wait, insist. Once one has failed, others that can only wait for it get the usual grace at most."""
    try:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        while any(child.process.poll() is None for child in children):
            has_failure = any(child.process.poll() for child in children)
            if time.monotonic() - asked > (grace_after_failure_s if has_failure else grace_s):
                break
            time.sleep(POLL_S)
    finally:  # also where a second Ctrl-C ends the wait: they would fail one by one for what goes with this process
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()


def _faults(failed: Sequence[Child]) -> list[DpoCacheError]:
    """What went wrong, each fault once. A process killed from outside comes first: others may have failed for it."""
    killed = [_ended(child) for child in failed if child.process.returncode < 0]
    explained = [fault for fault in map(_left_fault, failed) if fault is not None]
    return list({str(fault): fault for fault in killed + explained}.values()) or [_ended(child) for child in failed[:1]]


def _left_fault(child: Child) -> DpoCacheError | None:
    """The fault that a child has left; None where it left none, or a full disk cut it short."""
    try:
        return DpoCacheError(**json.loads(child.fault_file.read_bytes()))
    except (OSError, ValueError):
        return None


def _ended(child: Child) -> DpoCacheError:
    how = _how(child.process.returncode)
    return DpoCacheError(f"a process of this job ended with {how}; its own output is above")


def _fault_of(job: Job, child: Child) -> str | None:
    if child.process.returncode == 0:
        return None
    fault = _left_fault(child)
    if fault is not None:
        return str(fault)
    return f"{job.name} ended with {_how(child.process.returncode)}; its output is in {job.log}"


def _how(return_code: int) -> str:
    if return_code > 0:
        return f"exit code {return_code}"
    name = signal.Signals(-return_code).name
    return f"{name}, which mostly means that the system ran out of memory" if name == "SIGKILL" else name

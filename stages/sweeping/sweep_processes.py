"""The processes of a sweep: each run is trained by a ``dpo-train`` of its own, with a log file of its own."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..console.terminal import say
from ..processes.child_processes import Job, python_command, run_jobs
from ..setting import command_line_of
from .sweep_record import SweepRecord
from .sweep_run import SweepRun


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A run to train further.

    Attributes:
        run: The run.
        until: Updates it has done when the process ends.
        label: How messages call it.
    """

    run: SweepRun
    until: int
    label: str

    def command(self) -> list[str]:
        """The process; it resumes where there is something to resume from."""
        stop = self.until if self.until < self.run.recipe.total_steps else None
        config = replace(self.run.point.config, resume="latest", stop_after_steps=stop)
        return python_command("train", *command_line_of(config))

    def summary(self) -> str:
        """What the process will do, for people."""
        verb = "resumes" if self.run.has_begun() else "starts"
        return f"{verb}, up to update {self.until} of {self.run.recipe.total_steps}"


class SweepProcesses:
    """Trains runs of a sweep, as many at a time as there are places.

    Args:
        places: For each place the variables of the process that runs there, such as its GPUs.
        logs: Folder of the log files.
        grace_s: How long runs that are asked to stop may take before they are killed.
        record: Told each process that has ended.
    """

    def __init__(self, places: Sequence[Mapping[str, str]], *, logs: Path, grace_s: float, record: SweepRecord) -> None:
        self._places = places
        self._logs = logs
        self._grace_s = grace_s
        self._record = record
        self._started: dict[str, float] = {}

    def train_to_the_end(self, runs: Sequence[SweepRun]) -> None:
        """Do all updates of these runs; see :meth:`train`."""
        self.train(runs, until={run.name: run.recipe.total_steps for run in runs})

    def train(self, runs: Sequence[SweepRun], *, until: Mapping[str, int]) -> None:
        """Train each run up to an update; runs that have reached it are left alone. One that fails stops no other.

        Args:
            runs: In the order in which they start.
            until: The update, by the run's name.

        Raises:
            KeyboardInterrupt: Asked to stop; what was under way has saved.
        """
        unfinished = [run for run in runs if not run.has_reached(until[run.name])]
        tasks = {
            run.name: _Task(run=run, until=until[run.name], label=f"[{number}/{len(unfinished)}] {run.name}:")
            for number, run in enumerate(unfinished, start=1)
        }
        self._logs.mkdir(exist_ok=True)
        jobs = [Job(name=name, command=task.command(), log=self._logs / f"{name}.log") for name, task in tasks.items()]
        run_jobs(
            jobs,
            self._places,
            grace_s=self._grace_s,
            on_start=lambda job: self._starts(job, tasks[job.name]),
            on_end=lambda job, fault: self._has_ended(tasks[job.name], fault),
        )

    def _starts(self, job: Job, task: _Task) -> None:
        self._started[job.name] = time.monotonic()
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(job.command)}\n")
        say(f"{task.label} {task.summary()}; log: {job.log}")

    def _has_ended(self, task: _Task, fault: str | None) -> None:
        seconds = time.monotonic() - self._started.pop(task.run.name)
        if fault is not None:
            say(f"{task.label} failed: {fault}")
        elif task.run.has_reached(task.until):
            say(f"{task.label} done in {seconds:.0f} s")
        self._record.add_process(task.run.name, seconds=seconds, fault=fault)

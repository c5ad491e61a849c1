"""A sweep: many runs of stage two from one cache.

Everything that can be checked in advance is checked before anything starts. Then the pairs that the cache lacks are
scored, once. Then every point is trained by a ``dpo-train`` in a process of its own. All state is on the disk: whatever
ended a sweep, the same command skips finished points and continues the others.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from .addresses.local_copy import glance
from .build import build
from .console.counted_noun import counted
from .console.library_output import quiet_libraries
from .console.terminal import say
from .processes.child_processes import Job, python_command, run_jobs
from .setting import command_line_of
from .sweeping.sweep_config import SweepConfig
from .sweeping.sweep_grid import SweepGrid, SweepPoint, read_grid
from .sweeping.sweep_halving import (
    better_ones,
    default_figure,
    given_up_on_a_tie,
    margins_compare,
    refuse_points_without_margin,
    rung_shares,
    rung_steps,
    separations_compare,
)
from .sweeping.sweep_places import places_for, visible_gpus
from .sweeping.sweep_report import (
    FAILED,
    FINISHED,
    GIVEN_UP,
    INTERRUPTED,
    NOT_STARTED,
    SweepBuild,
    SweepReport,
    SweepRow,
    options_text,
    recorded,
)
from .sweeping.sweep_run import Score, SweepRun
from .train import SAVING_GRACE_S
from .training.held_out_overlap import overlap_warnings
from .training.output_folder import output_lock
from .training.recipe import resolve_recipe, warnings_of

STOPPING_GRACE_S = SAVING_GRACE_S + 60.0
"""A run that is asked to stop gives its own processes this long to save, and then has to end itself."""
HELD_OUT = "the held-out pairs, at the last evaluation"
TRAINED_ON = "the training pairs of the last logged updates, before each update (there is no `eval-mixture`)"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """What a sweep would run.

    Attributes:
        points: Name and command of each run.
    """

    points: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """A command a line, ready for a shell."""
        return "\n".join(self.points.values())


def sweep(grid_file: Path, config: SweepConfig) -> SweepReport | SweepPlan:
    """Run a sweep, or only say what it would run.

    Raises:
        DpoCacheError: The grid, a point, the cache or the machine does not allow it; nothing was started. Or the build
            failed. A point that fails while it trains raises nothing: it is in the report.
        KeyboardInterrupt: Asked to stop; what was under way has saved.
    """
    quiet_libraries()
    from .sweeping.sweep_check import check_points, expected_cache  # only now: it imports DeepSpeed

    grid = read_grid(grid_file)
    places = places_for(config, [point.config for point in grid.points], gpus=visible_gpus())
    if config.strategy == "halving":
        refuse_points_without_margin(grid.points)
    check_points(grid.points, expected_cache(grid))
    if config.plan:
        return SweepPlan(points={point.name: shlex.join(_command(point)) for point in grid.points})
    with output_lock(grid.output):
        return Sweep(grid, config, places).run()


class Sweep:
    """One start of a sweep that can run.

    Args:
        grid: The points; each can use the cache.
        config: Which of them are trained to the end, and how many at a time.
        places: The variables of the process at each place.
    """

    def __init__(self, grid: SweepGrid, config: SweepConfig, places: Sequence[Mapping[str, str]]) -> None:
        self._grid = grid
        self._config = config
        self._places = places
        self._faults: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._started: dict[str, float] = {}
        self._separations_compare = separations_compare(grid.points)
        before = recorded(grid.output) or {"builds": [], "rows": []}
        self._builds = [SweepBuild(**fields) for fields in before["builds"]]
        self._seconds = {row["name"]: float(row["seconds"]) for row in before["rows"]}

    def run(self) -> SweepReport:
        """Build what is missing, train what is not finished, and report."""
        self._build()
        self._runs = self._resolve()
        try:
            if self._config.strategy == "halving":
                self._run_halving()
            else:
                self._train_to_the_end(self._runs)
        finally:
            report = self._report()
            report.write()
        return report

    # ---- before the first point --------------------------------------------------------------------------------

    def _build(self) -> None:
        for config in self._grid.builds:
            report = build(config)
            assert report is not None, "no launcher started this process"
            if report.reference_forwards:
                self._builds.append(
                    SweepBuild(
                        mixture=report.mixture,
                        pairs_scored=report.pairs_scored,
                        reference_forwards=report.reference_forwards,
                        seconds=report.seconds,
                    )
                )

    def _resolve(self) -> list[SweepRun]:
        configs = [point.config for point in self._grid.points]
        together = sorted({(config.mixture, config.eval_mixture) for config in configs if config.eval_mixture})
        names = sorted({config.mixture for config in configs} | {name for _, name in together})
        with glance(self._grid.cache, names, first_rows=0) as folder:
            cache = ReferenceCache.open(folder)
            mixtures = {name: cache.read_mixture(name) for name in names}
            runs = [self._resolved(point, cache, mixtures[point.config.mixture]) for point in self._grid.points]
            for training, evaluation in together:
                for warning in overlap_warnings(mixtures[training], mixtures[evaluation]):
                    say(f"warning: {warning}")
        for run in runs:
            run.refuse_other_settings()
            for warning in warnings_of(run.recipe):
                say(f"warning: {run.name}: {warning}")
        return runs

    def _resolved(self, point: SweepPoint, cache: ReferenceCache, mixture: Mixture) -> SweepRun:
        num_ranks = point.config.num_gpus or self._ranks()
        return SweepRun(point=point, recipe=resolve_recipe(point.config, cache, mixture, num_ranks=num_ranks))

    def _ranks(self) -> int:
        """Ranks of a run that names no number of its own."""
        return self._config.gpus_per_run or max(1, len(visible_gpus()))

    # ---- the points --------------------------------------------------------------------------------------------

    def _run_halving(self) -> None:
        factor, by = self._config.halving_factor or 2.0, self._halving_by()
        *rungs, _ = rung_shares(self._config.rungs or 3, factor)
        runs = self._runs
        for share in rungs:
            if len(runs) <= 1:
                break  # there is nothing left to compare with
            steps = {run.name: rung_steps(share, run.recipe.total_steps) for run in runs}
            self._train(runs, until=steps)
            runs = [run for run in runs if run.name not in self._faults]
            found = {run.name: run.held_out_score(steps[run.name]) for run in runs}
            scores = {name: self._comparable(score) for name, score in found.items() if score is not None}
            if len(scores) < len(runs):
                unjudged = ", ".join(name for name in found if name not in scores)
                say(f"not evaluated after {share:.0%} of the updates, so not compared there: {unjudged}")
            if not scores:
                continue
            going_on = better_ones(scores, factor=factor, by=by)
            self._given_up |= scores.keys() - set(going_on)
            say(
                f"after {share:.0%} of the updates, {len(going_on)} of {counted(len(scores), 'point')} will continue: "
                f"{', '.join(going_on)}"
            )
            tied = given_up_on_a_tie(scores, going_on, by=by)
            if tied:
                say(f"given up with the same {by} as a point that continues: {', '.join(tied)}")
            runs = [run for run in runs if run.name not in self._given_up]
        self._train_to_the_end(runs)

    def _halving_by(self) -> str:
        if self._config.halving_by == "margin" and not margins_compare(self._grid.points):
            say(
                "warning: the points differ in loss or beta, and a margin grows with beta: --halving-by margin "
                "compares figures of different units; --halving-by accuracy does not"
            )
        return self._config.halving_by or default_figure(self._grid.points)

    def _comparable(self, score: Score) -> Score:
        """Without margin / beta where that has another unit at other points: a tie then stays one."""
        return score if self._separations_compare else replace(score, separation=None)

    def _train_to_the_end(self, runs: Sequence[SweepRun]) -> None:
        self._train(runs, until={run.name: run.recipe.total_steps for run in runs})

    def _train(self, runs: Sequence[SweepRun], *, until: Mapping[str, int]) -> None:
        """Train each run up to some update; those that are there already are left alone."""
        todo = {run.name: run for run in runs if not run.has_reached(until[run.name])}
        logs = self._grid.output / "logs"
        logs.mkdir(exist_ok=True)

        def numbered(job: Job) -> str:
            return f"[{list(todo).index(job.name) + 1}/{len(todo)}] {job.name}:"

        def started(job: Job) -> None:
            self._started[job.name] = time.monotonic()
            with job.log.open("a", encoding="utf-8") as log:
                log.write(f"$ {shlex.join(job.command)}\n")
            say(f"{numbered(job)} {_to_do(todo[job.name], until[job.name])}; log: {job.log}")

        def ended(job: Job, fault: str | None) -> None:
            seconds = time.monotonic() - self._started.pop(job.name)
            self._seconds[job.name] = self._seconds.get(job.name, 0.0) + seconds
            if fault is not None:
                self._faults[job.name] = fault
                say(f"{numbered(job)} failed: {fault}")
            elif todo[job.name].has_reached(until[job.name]):
                say(f"{numbered(job)} done in {seconds:.0f} s")
            self._report().write()

        jobs = [
            Job(name=name, command=_process(run, until[name]), log=logs / f"{name}.log") for name, run in todo.items()
        ]
        run_jobs(jobs, self._places, grace_s=STOPPING_GRACE_S, on_start=started, on_end=ended)

    # ---- the report --------------------------------------------------------------------------------------------

    def _report(self) -> SweepReport:
        held_out = all(point.config.eval_mixture for point in self._grid.points)
        rows = [self._row(run, held_out=held_out) for run in self._runs]
        return SweepReport(
            output=str(self._grid.output),
            cache=str(self._grid.cache),
            strategy=self._config.strategy,
            judged_by=HELD_OUT if held_out else TRAINED_ON,
            builds=tuple(self._builds),
            rows=tuple(sorted(rows, key=SweepRow.place)),
        )

    def _row(self, run: SweepRun, *, held_out: bool) -> SweepRow:
        score = self._comparable(run.last_score(held_out=held_out))
        return SweepRow(
            name=run.name,
            options=options_text(run.point.options),
            status=self._status(run),
            steps=run.steps_done(),
            total_steps=run.recipe.total_steps,
            accuracy=score.accuracy,
            margin=score.margin,
            separation=score.separation,
            step0_loss=run.step_zero_loss(),
            seconds=self._seconds.get(run.name, 0.0),
            fault=self._faults.get(run.name),
        )

    def _status(self, run: SweepRun) -> str:
        if run.name in self._faults:
            return FAILED
        if run.has_reached(run.recipe.total_steps):
            return FINISHED
        if run.name in self._given_up:
            return GIVEN_UP
        return INTERRUPTED if run.has_begun() else NOT_STARTED


def _command(point: SweepPoint) -> list[str]:
    """The command that would train a point by hand."""
    return ["dpo-train", *command_line_of(replace(point.config, resume="latest"))]


def _process(run: SweepRun, until: int) -> list[str]:
    """The process that trains a run up to some update: it goes on where there is something to go on from."""
    stop = until if until < run.recipe.total_steps else None
    config = replace(run.point.config, resume="latest", stop_after_steps=stop)
    return python_command("train", *command_line_of(config))


def _to_do(run: SweepRun, until: int) -> str:
    verb = "resumes" if run.has_begun() else "starts"
    return f"{verb}, up to update {until} of {run.recipe.total_steps}"

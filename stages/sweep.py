"""A sweep: many runs of stage two from one cache.

Everything that can be checked in advance is checked before anything starts. Then the pairs that the cache lacks are
scored, once. Then every point is trained by a ``dpo-train`` in a process of its own. All state is on the disk: whatever
ended a sweep, the same command skips finished points and continues the others.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from .addresses.local_copy import glance
from .build import build
from .console.library_output import quiet_libraries
from .console.terminal import say
from .setting import command_line_of
from .sweeping.sweep_config import SweepConfig
from .sweeping.sweep_grid import SweepGrid, SweepPoint, read_grid
from .sweeping.sweep_halving import refuse_points_without_margin
from .sweeping.sweep_places import places_for, visible_gpus
from .sweeping.sweep_processes import SweepProcesses
from .sweeping.sweep_record import SweepRecord
from .sweeping.sweep_report import SweepBuild, SweepReport
from .sweeping.sweep_run import SweepRun
from .sweeping.sweep_rungs import train_by_halving
from .train import SAVING_GRACE_S
from .training.held_out_overlap import overlap_warnings
from .training.output_folder import output_lock
from .training.recipe import resolve_recipe, warnings_of

STOPPING_GRACE_S = SAVING_GRACE_S + 60.0
"""A run that is asked to stop gives its own processes this long to save, and then has to end itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """What a sweep would run.

    Attributes:
        builds: Mixture and command of each build; they come before the runs.
        points: Name and command of each run.
    """

    builds: dict[str, str]
    points: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """A command a line, ready for a shell."""
        return "\n".join([*self.builds.values(), *self.points.values()])


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
        return _plan(grid)
    with output_lock(grid.output):
        return _build_and_train(grid, config, places)


def _plan(grid: SweepGrid) -> SweepPlan:
    """The commands that would do by hand what the sweep does."""
    return SweepPlan(
        builds={one.mixture: shlex.join(["dpo-cache", "build", *command_line_of(one)]) for one in grid.builds},
        points={
            point.name: shlex.join(["dpo-train", *command_line_of(replace(point.config, resume="latest"))])
            for point in grid.points
        },
    )


def _build_and_train(grid: SweepGrid, config: SweepConfig, places: Sequence[Mapping[str, str]]) -> SweepReport:
    """Score what is missing, train what is not finished, and report, also when asked to stop."""
    builds = list(_build_missing(grid))
    runs = _resolve_runs(grid, num_ranks=config.gpus_per_run or max(1, len(visible_gpus())))
    record = SweepRecord(grid, runs, strategy=config.strategy, builds=builds)
    processes = SweepProcesses(places, logs=grid.output / "logs", grace_s=STOPPING_GRACE_S, record=record)
    try:
        if config.strategy == "halving":
            train_by_halving(runs, config, processes, record)
        else:
            processes.train_to_the_end(runs)
    finally:
        report = record.write()
    return report


def _build_missing(grid: SweepGrid) -> Iterator[SweepBuild]:
    """Carry out the builds; yields those that had anything to score."""
    for config in grid.builds:
        report = build(config)
        assert report is not None, "no launcher started this process"
        if report.reference_forwards:
            yield SweepBuild(
                mixture=report.mixture,
                pairs_scored=report.pairs_scored,
                reference_forwards=report.reference_forwards,
                seconds=report.seconds,
            )


def _resolve_runs(grid: SweepGrid, *, num_ranks: int) -> list[SweepRun]:
    """Work out the numbers of every point, and say what looks wrong about them.

    Args:
        grid: The points.
        num_ranks: Ranks of a run that names no number of its own.

    Raises:
        DpoCacheError: A number that does not fit, or a folder with a run of other settings.
    """
    configs = [point.config for point in grid.points]
    together = sorted({(config.mixture, config.eval_mixture) for config in configs if config.eval_mixture})
    names = sorted({config.mixture for config in configs} | {name for _, name in together})
    with glance(grid.cache, names, first_rows=0) as folder:
        cache = ReferenceCache.open(folder)
        mixtures = {name: cache.read_mixture(name) for name in names}
        runs = [_resolve_run(point, cache, mixtures[point.config.mixture], num_ranks) for point in grid.points]
        for training, evaluation in together:
            for warning in overlap_warnings(mixtures[training], mixtures[evaluation]):
                say(f"warning: {warning}")
    for run in runs:
        run.refuse_other_settings()
        for warning in warnings_of(run.recipe):
            say(f"warning: {run.name}: {warning}")
    return runs


def _resolve_run(point: SweepPoint, cache: ReferenceCache, mixture: Mixture, num_ranks: int) -> SweepRun:
    recipe = resolve_recipe(point.config, cache, mixture, num_ranks=point.config.num_gpus or num_ranks)
    return SweepRun(point=point, recipe=recipe)

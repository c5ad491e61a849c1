"""What has become of a sweep's points, over all its starts: kept in its folder after every process that ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .sweep_grid import SweepGrid
from .sweep_halving import comparable, separations_compare
from .sweep_report import (
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
from .sweep_run import SweepRun

HELD_OUT = "the held-out pairs, at the last evaluation"
TRAINED_ON = "the training pairs of the last logged updates, before each update (there is no `eval-mixture`)"


class SweepRecord:
    """The points' times, faults and results. Starts from what earlier starts of the sweep left.

    Args:
        grid: The points.
        runs: Their runs.
        strategy: ``grid`` or ``halving``.
        builds: What this start has scored.
    """

    def __init__(
        self, grid: SweepGrid, runs: Sequence[SweepRun], *, strategy: str, builds: Sequence[SweepBuild]
    ) -> None:
        earlier = recorded(grid.output) or {"builds": [], "rows": []}
        self._grid = grid
        self._runs = runs
        self._strategy = strategy
        self._builds = (*(SweepBuild(**fields) for fields in earlier["builds"]), *builds)
        self._seconds = {row["name"]: float(row["seconds"]) for row in earlier["rows"]}
        self._faults: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._held_out = all(point.config.eval_mixture for point in grid.points)
        self._separations_compare = separations_compare(grid.points)

    def add_process(self, name: str, *, seconds: float, fault: str | None) -> None:
        """Count a process of a run that has ended.

        Args:
            name: The point.
            seconds: Wall time of the process.
            fault: Why it failed; None where it did not.
        """
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if fault is not None:
            self._faults[name] = fault
        self.write()

    def give_up(self, names: Collection[str]) -> None:
        """Note the points that are not trained any further."""
        self._given_up.update(names)

    def has_failed(self, name: str) -> bool:
        """Whether a process of this point failed in this start of the sweep."""
        return name in self._faults

    def write(self) -> SweepReport:
        """Write the table to the sweep's folder, and return it."""
        report = SweepReport(
            output=str(self._grid.output),
            cache=str(self._grid.cache),
            strategy=self._strategy,
            judged_by=HELD_OUT if self._held_out else TRAINED_ON,
            builds=self._builds,
            rows=tuple(sorted(map(self._row, self._runs), key=SweepRow.place)),
        )
        report.write()
        return report

    def _row(self, run: SweepRun) -> SweepRow:
        score = comparable(run.last_score(held_out=self._held_out), separations=self._separations_compare)
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

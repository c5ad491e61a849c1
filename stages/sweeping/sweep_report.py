"""The results of a sweep: ``sweep.json``, ``sweep.csv`` and ``sweep.md`` in its folder, and the table on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...pipeline.training.run_file import read_run_json, write_run_file, write_run_json
from ..console.next_command import report_command
from .sweep_grid import value_text
from .sweep_run import Score

FILE = "sweep.json"
FINISHED, GIVEN_UP, INTERRUPTED, FAILED, NOT_STARTED = "finished", "given up", "interrupted", "failed", "not started"
ORDER = (FINISHED, GIVEN_UP, INTERRUPTED, FAILED, NOT_STARTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """One point.

    Attributes:
        name: The point; also its folder.
        options: Its own options as people write them.
        status: One of :data:`ORDER`.
        steps: Updates done, as far as they were logged.
        total_steps: Updates of the whole run.
        accuracy, margin: Its rewards, on the pairs that the report names.
        separation: The margin divided by beta; None where that has another unit at other points.
        step0_loss: Loss before the first update.
        seconds: Wall time of all its processes, those of earlier starts of the sweep included.
        fault: Why it failed.
    """

    name: str
    options: dict[str, str]
    status: str
    steps: int
    total_steps: int
    accuracy: float | None
    margin: float | None
    separation: float | None
    step0_loss: float | None
    seconds: float
    fault: str | None

    def place(self) -> tuple[object, ...]:
        """Sorts the best first: those trained longest, by accuracy, then by margin / beta."""
        score = Score(accuracy=self.accuracy, margin=self.margin, separation=self.separation)
        accuracy, separation = score.key()
        share = self.steps / self.total_steps if self.status == GIVEN_UP else 0.0
        return ORDER.index(self.status), -share, -accuracy, -separation

    def cells(self) -> list[str]:
        """For the eyes: as :data:`TITLES` has them."""
        return [
            self.name,
            self.status if self.status == FINISHED else f"{self.status} ({self.steps} of {self.total_steps})",
            "" if self.accuracy is None else f"{self.accuracy:.1%}",
            "" if self.margin is None else f"{self.margin:.3g}",
            "" if self.separation is None else f"{self.separation:.3g}",
            "" if self.step0_loss is None else f"{self.step0_loss:.4f}",
            f"{self.seconds:,.0f}",
        ]


TITLES = ("point", "status", "accuracy", "margin", "margin / beta", "step-0 loss", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepBuild:
    """A build that scored something for this sweep.

    Attributes:
        mixture: What it was for.
        pairs_scored: Pairs that the cache lacked.
        reference_forwards: Forward passes of the reference.
        seconds: Its wall time.
    """

    mixture: str
    pairs_scored: int
    reference_forwards: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepReport:
    """A sweep, finished or not.

    Attributes:
        output: Its folder.
        cache: The cache of all points.
        strategy: ``grid`` or ``halving``.
        judged_by: The pairs that accuracy and margin are of.
        builds: What was scored, by this start of the sweep and those before.
        rows: The points, the best first.
    """

    output: str
    cache: str
    strategy: str
    judged_by: str
    builds: tuple[SweepBuild, ...]
    rows: tuple[SweepRow, ...]

    @property
    def best(self) -> list[str]:
        """The finished points of the highest accuracy: several where they tie, none where no accuracy is known."""
        finished = [row for row in self.rows if row.status == FINISHED and row.accuracy is not None]
        return [row.name for row in finished if row.accuracy == finished[0].accuracy]

    @property
    def reference_forwards(self) -> int:
        """Forward passes of the reference: all of them in builds, as training has no code for any."""
        return sum(build.reference_forwards for build in self.builds)

    @property
    def num_failed(self) -> int:
        """Points that failed."""
        return sum(row.status == FAILED for row in self.rows)

    def write(self) -> None:
        """Keep it in the sweep's folder."""
        folder = Path(self.output)
        write_run_json(folder / FILE, self.to_json())
        write_run_file(folder / "sweep.csv", self.csv())
        write_run_file(folder / "sweep.md", self.markdown())

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {**asdict(self), "best": self.best, "reference_forwards": self.reference_forwards}

    def csv(self) -> str:
        """A line a point, a column an option."""
        options = list(dict.fromkeys(name for row in self.rows for name in row.options))
        figures = [name for name in SweepRow.__slots__ if name != "options"]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*figures, *options])
        for row in self.rows:
            values = [getattr(row, name) for name in figures]
            one_line = [" ".join(value.split()) if isinstance(value, str) else value for value in values]
            writer.writerow([*one_line, *(row.options.get(name) for name in options)])
        return file.getvalue()

    def markdown(self) -> str:
        """The table with what has to be known about it."""
        faults = [f"- `{row.name}`: {row.fault.splitlines()[0]}" for row in self.rows if row.fault]
        return "\n".join(
            [
                f"Accuracy and margin: {self.judged_by}. {self._forwards()}",
                "",
                *_markdown_table(TITLES, [row.cells() for row in self.rows]),
                *(["", f"Best: {self._best()}."] if self.best else []),
                *(["", "Failed:", "", *faults] if faults else []),
                "",
            ]
        )

    def text(self) -> str:
        """The table on a terminal, and what to do next."""
        lines = [*_aligned(TITLES, [row.cells() for row in self.rows]), ""]
        lines.append(f"accuracy and margin: {self.judged_by}")
        lines.append(self._forwards())
        for row in self.rows:
            if row.fault:
                lines += [f"failed: {row.name}", *(f"  {line}" for line in row.fault.splitlines())]
        lines.append(f"table: {self.output}/sweep.md, sweep.csv, {FILE}")
        if self.best:
            lines.append(f"best: {self._best()}")
            name = self.best[0] if len(self.best) == 1 else "POINT"
            lines.append(f"model: {self.output}/{name}/model")
        lines.append(report_command(self.output))
        return "\n".join(lines)

    def _best(self) -> str:
        return ", ".join(self.best) + (" (tied)" if len(self.best) > 1 else "")

    def _forwards(self) -> str:
        if not self.builds:
            return "Forward passes of the reference: none, as the cache was complete."
        return f"Forward passes of the reference: {self.reference_forwards} in building the cache, once for all runs."


def recorded(output: Path) -> dict[str, Any] | None:
    """What an earlier start of the sweep wrote; None if there was none."""
    path = output / FILE
    return read_run_json(path) if path.exists() else None


def options_text(options: Mapping[str, Any]) -> dict[str, str]:
    """A point's options as people write them."""
    return {name: value_text(value) for name, value in options.items()}


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words, numbers = list(zip(cells, widths, strict=True))[:2], list(zip(cells, widths, strict=True))[2:]
        written = [cell.ljust(width) for cell, width in words] + [cell.rjust(width) for cell, width in numbers]
        return "  ".join(written).rstrip()

    return [line(titles), *map(line, rows)]

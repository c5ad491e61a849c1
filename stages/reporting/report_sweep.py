"""What a folder named on the command line means: a run, or a sweep whose points are runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from ...pipeline.report.page_content import RunTable
from ...pipeline.report.run_record import is_run
from ...pipeline.report.run_table import NumberedRun, run_table

MAX_DEPTH = 3
"""How far below a sweep's folder its runs are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedFolder:
    """A folder and the runs it stands for.

    Attributes:
        path: Absolute, without links.
        runs: Itself, or the runs below it.
        states: What a sweep knows of its points, by name: given up, failed, never started.
        faults: Why points failed, by name.
    """

    path: Path
    runs: list[Path]
    states: dict[str, str]
    faults: dict[str, str]

    @property
    def is_sweep(self) -> bool:
        """Whether it holds runs instead of being one."""
        return self.runs != [self.path]


def named_folder(path: Path) -> NamedFolder:
    """Find the runs that a folder stands for.

    Raises:
        DpoCacheError: It is not a run and holds none.
    """
    if is_run(path):
        return NamedFolder(path=path, runs=[path], states={}, faults={})
    below, found = [path], []
    for _ in range(MAX_DEPTH):
        inside = {inner.resolve() for outer in below if outer.is_dir() for inner in outer.iterdir()}
        below = sorted(inner for inner in inside if inner.is_dir())
        found += [inner for inner in below if is_run(inner)]
        below = [inner for inner in below if not is_run(inner)]
    if not found:
        raise DpoCacheError(
            f"{path} is not a run and holds none" if path.is_dir() else f"there is no folder {path}",
            expected="the --output folder of dpo-train, or a folder of such folders",
        )
    points = _points(path / "sweep.json")
    return NamedFolder(
        path=path,
        runs=found,
        states={name: str(point["status"]) for name, point in points.items() if "status" in point},
        faults={name: str(point["fault"]).splitlines()[0] for name, point in points.items() if point.get("fault")},
    )


def run_tables(folders: Sequence[NamedFolder], runs: Mapping[Path, NumberedRun]) -> list[RunTable]:
    """A table for each sweep, and one for all runs that were named one by one."""
    tables = [
        run_table(
            f"Sweep in {'/'.join(folder.path.resolve().parts[-2:])}",
            [runs[path] for path in folder.runs],
            best_first=True,
            note=" ".join(
                [
                    "Finished points come first, sorted by held-out reward accuracy; equal accuracies are ties.",
                    *_absent(folder),
                ]
            ),
            states=folder.states,
        )
        for folder in folders
        if folder.is_sweep
    ]
    single = [runs[folder.path] for folder in folders if not folder.is_sweep]
    if single:
        tables.append(run_table("Run" if len(single) == 1 else "Runs", single, best_first=False))
    return tables


def _absent(folder: NamedFolder) -> list[str]:
    """What to say of points that have nothing to show, or failed."""
    started = {path.name for path in folder.runs}
    said = [f"{name}: {state}." for name, state in folder.states.items() if name not in started | set(folder.faults)]
    return said + [f"{name} failed: {fault.rstrip('.')}." for name, fault in folder.faults.items()]


def _points(path: Path) -> dict[str, dict[str, Any]]:
    """The points of ``sweep.json`` by name; none if there is no such file or it cannot be read."""
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {str(point["name"]): point for point in points}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

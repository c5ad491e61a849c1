"""Runs on one page: read their folders, look into the caches they name, write what they say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DpoCacheError
from ..pipeline.cache.durable_file import make_folder_durably, write_durably
from ..pipeline.report.figures import require_matplotlib, write_figures
from ..pipeline.report.page import page_html
from ..pipeline.report.page_content import ChartCurves, Curve, PageContent, PairGroup, RunTable
from ..pipeline.report.run_record import RunRecord, read_run
from ..pipeline.report.run_series import CHARTS, MAX_POINTS, series_of
from ..pipeline.report.run_settings import settings_table
from ..pipeline.report.run_table import NumberedRun, step_zero_row
from .console.byte_size import byte_size
from .console.counted_noun import counted
from .reporting.report_cache import cache_sections
from .reporting.report_pairs import OpenMixtures, held_out_pairs
from .reporting.report_sweep import named_folder, run_tables

POINTS_OF_A_PAGE = 400_000
"""Some 20 MB; of many long runs every curve is drawn with fewer points."""
FEWEST_POINTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSummary:
    """What was written.

    Attributes:
        page: The page.
        page_bytes: Its size.
        runs: Folders of the runs on it.
        figures: Picture files, where they were asked for.
        notes: What is missing from it, and why.
    """

    page: Path
    page_bytes: int
    runs: list[Path]
    figures: list[Path]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "page": str(self.page),
            "page_bytes": self.page_bytes,
            "runs": [str(run) for run in self.runs],
            "figures": [str(figure) for figure in self.figures],
            "notes": self.notes,
        }

    def text(self) -> str:
        """For a terminal."""
        runs = counted(len(self.runs), "run")
        lines = [*self.notes, f"{self.page}: {runs}, {byte_size(self.page_bytes)}; open it in any browser"]
        if self.figures:
            lines.append(f"{self.figures[0].parent}: {len(self.figures)} figures")
        return "\n".join(lines)


def report(folders: Sequence[Path], page: Path, *, figures_folder: Path | None = None) -> ReportSummary:
    """Write the page, and the figures where they are asked for.

    Args:
        folders: Of runs, or of sweeps, which hold runs.
        page: The HTML file; replaced where it exists.
        figures_folder: For one PNG a chart; None for none.

    Raises:
        DpoCacheError: A folder is not a run and holds none, matplotlib is missing, or the disk refused.
    """
    if figures_folder is not None:
        require_matplotlib()
    named = [named_folder(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    paths = list(dict.fromkeys(path for folder in named for path in folder.runs))
    runs = [read_run(path, name=name) for path, name in zip(paths, _names(paths), strict=True)]
    content = _content(runs, run_tables(named, dict(zip(paths, _numbered(runs), strict=True))))
    make_folder_durably(page.parent)
    html = page_html(content, version=__version__, written=datetime.now())
    write_durably(page, html.encode(), temporary_folder=page.parent)
    return ReportSummary(
        page=page,
        page_bytes=page.stat().st_size,
        runs=paths,
        figures=write_figures(content.charts, content.run_names, figures_folder) if figures_folder else [],
        notes=content.notes,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    parts = [path.parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _numbered(runs: Sequence[RunRecord]) -> list[NumberedRun]:
    return [NumberedRun(number=number, record=run) for number, run in enumerate(runs)]


def _content(runs: Sequence[RunRecord], tables: list[RunTable]) -> PageContent:
    room = POINTS_OF_A_PAGE // (2 * len(CHARTS) * len(runs))  # two curves in a chart: training and held out
    max_points = max(FEWEST_POINTS, min(MAX_POINTS, room))
    charts = [
        ChartCurves(
            chart=chart,
            curves=[
                Curve(number=number, series=series)
                for number, run in enumerate(runs)
                for series in series_of(run, chart, max_points=max_points)
            ],
        )
        for chart in CHARTS
    ]
    with closing(OpenMixtures()) as mixtures:
        caches = cache_sections(runs, mixtures)
        pairs, missing = _held_out_pairs(runs, mixtures)
    return PageContent(
        run_names=[run.name for run in runs],
        tables=tables,
        settings=settings_table(runs),
        step_zero=[step_zero_row(run) for run in _numbered(runs)],
        charts=[chart for chart in charts if chart.curves],
        caches=caches,
        pairs=pairs,
        notes=[*_notes(runs, charts), *missing],
    )


def _held_out_pairs(runs: Sequence[RunRecord], mixtures: OpenMixtures) -> tuple[list[PairGroup], list[str]]:
    groups, missing = [], []
    for run in runs:
        try:
            group = held_out_pairs(run, mixtures)
        except DpoCacheError as fault:
            missing.append(f"{run.name}: held-out pairs cannot be shown: {fault.found}")
        else:
            groups += [group] if group else []
    return groups, missing


def _notes(runs: Sequence[RunRecord], charts: Sequence[ChartCurves]) -> list[str]:
    """What a reader of the page should know before the figures."""
    notes = []
    for run in runs:
        if not run.steps:
            notes.append(f"{run.name}: no update has been logged yet")
        if run.unreadable_lines:
            lines = counted(run.unreadable_lines, "line")
            notes.append(f"{run.name}: {lines} of metrics.jsonl incomplete and left out")
    curves = [curve.series for chart in charts for curve in chart.curves]
    if any(series.lines > len(series.values) for series in curves):
        longest = max(curves, key=lambda series: series.lines)
        notes.append(
            f"curves of up to {longest.lines:,} points are drawn with {len(longest.values):,}: the lowest and the "
            "highest value of each interval"
        )
    return notes

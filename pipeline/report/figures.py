"""The same curves as pictures for a paper, one PNG a chart, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from ..data.printable_text import printable
from .page_content import ChartCurves

INCHES = (5.0, 3.2)
DOTS_PER_INCH = 300
MAX_NAMED = 10


def require_matplotlib() -> None:
    """Refuse before any work is done.

    Raises:
        DpoCacheError: It is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DpoCacheError(
            "--png draws with matplotlib, which is not installed", next_step='pip install "dpo-cache[report]"'
        )


def write_figures(charts: Sequence[ChartCurves], run_names: Sequence[str], folder: Path) -> list[Path]:
    """One PNG a chart, named by its field.

    Raises:
        DpoCacheError: The folder cannot be written.
    """
    # Figures without pyplot: no display, no state that outlives the call.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_write(chart, run_names, folder) for chart in charts]
    except OSError as refused:
        raise DpoCacheError(f"--png {folder} cannot be written: {refused.strerror}") from refused


def _write(chart: ChartCurves, run_names: Sequence[str], folder: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for curve in chart.curves:
        series = curve.series
        style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 3} if series.is_evaluation else {}
        if len(series.values) == 1:
            style |= {"marker": "o"}
        name = printable(run_names[curve.number]) + (", held out" if series.is_evaluation else "")
        # A name that begins with an underscore would be left out of the legend, and dollars would be set as formulas.
        label = "\u200b" + name.replace("$", r"\$")
        axes.plot(series.steps, series.values, color=f"C{curve.number}", linewidth=1.2, label=label, **style)
    axes.set_xlabel("updates")
    axes.set_ylabel(f"{chart.chart.title}\n({chart.chart.unit})")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(chart.curves) <= MAX_NAMED:
        axes.legend(fontsize="small", frameon=False)
    path = folder / f"{chart.chart.field.replace('/', '-')}.png"
    figure.savefig(path)
    return path

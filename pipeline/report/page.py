"""The page itself: one HTML file with its style, its script and its numbers in it, which asks no network for anything.

What it shows was written by strangers. Every text goes through Jinja's escaping, every number through JSON, and the
page's own policy lets the browser run the one script whose digest stands in it and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..data.printable_text import printable
from .page_content import STEP_ZERO_COLUMNS, ChartCurves, PageContent

_PAGE = resources.files(__package__) / "page"


def page_html(content: PageContent, *, version: str, written: datetime) -> str:
    """The page as text.

    Args:
        content: What stands on it.
        version: Of this package, for the last line.
        written: When it is made, for the same.
    """
    style, script = (_PAGE.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "charts.js"))
    environment = Environment(
        loader=PackageLoader(__package__, "page"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    histograms = [histogram for cache in content.caches for histogram in cache.histograms]
    return environment.get_template("page.html.jinja").render(
        content=content,
        step_zero_columns=STEP_ZERO_COLUMNS,
        data={
            "runs": [printable(name) for name in content.run_names],
            "charts": [_chart_data(chart) for chart in content.charts],
            "histograms": [asdict(histogram) for histogram in histograms],
        },
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
        version=version,
        written=written.strftime("%Y-%m-%d %H:%M"),
    )


def _shown(value: object) -> object:
    """What is written of a value: text without control characters, our own markup as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _chart_data(chart: ChartCurves) -> dict[str, Any]:
    return {
        "field": chart.chart.field,
        "curves": [
            {
                "run": curve.number,
                "field": curve.series.field,
                "held_out": curve.series.is_evaluation,
                "steps": curve.series.steps,
                "seconds": _finite(curve.series.seconds),
                "values": _finite(curve.series.values),
            }
            for curve in chart.curves
        ],
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no word for the others."""
    return [value if math.isfinite(value) else None for value in values]


def _digest(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

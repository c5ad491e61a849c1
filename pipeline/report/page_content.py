"""What stands on the page, in the order it is read; text as it came, escaped only when the page is written."""

from __future__ import annotations

from dataclasses import dataclass

from .histogram import Histogram
from .run_series import Chart, Series


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One run in a table.

    Attributes:
        number: Its place among all runs of the page, which gives it its colour.
        name: What it is called.
        state: How far it came.
        cells: Text of each column.
    """

    number: int
    name: str
    state: str
    cells: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTable:
    """Runs side by side: those of a sweep, or those named one by one.

    Attributes:
        heading: Above the table.
        note: What to know about it.
        columns: After name and state: the settings in which the runs differ, then their results.
        rows: Best first in a sweep.
    """

    heading: str
    note: str
    columns: list[str]
    rows: list[RunRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingsTable:
    """What the runs were trained with.

    Attributes:
        rows: A setting's name, and its value in each run of the page, in their order.
    """

    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepZeroRow:
    """What the check before the first update found in one run.

    Attributes:
        number: Its place among all runs of the page.
        name: What it is called.
        passed: Whether policy and cache agreed within the bound.
        result: The same in words, or why it is not known.
        cells: Text of each column of :data:`STEP_ZERO_COLUMNS`.
    """

    number: int
    name: str
    passed: bool
    result: str
    cells: list[str]


STEP_ZERO_COLUMNS = ("loss", "expected", "mean difference", "largest", "bound", "largest / bound", "dtype", "pairs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A series and whose it is."""

    number: int
    series: Series


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartCurves:
    """A chart that at least one run has something to say to."""

    chart: Chart
    curves: list[Curve]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRun:
    """Neighbouring tokens as text, all scored or all not."""

    text: str
    scored: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PairPart:
    """The prompt or an answer.

    Attributes:
        name: ``prompt``, ``chosen`` or ``rejected``.
        facts: Its length, and what the reference said.
        text: Decoded.
        omitted: Characters left out at its end.
    """

    name: str
    facts: str
    text: list[TextRun]
    omitted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCard:
    """One pair, decoded."""

    margin: str
    key: str
    parts: list[PairPart]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairGroup:
    """Pairs at the two ends of a margin.

    Attributes:
        heading: Whose margin.
        note: What the margin is, and why ids stand in place of text where they do.
        largest, smallest: From the outermost inwards.
    """

    heading: str
    note: str
    largest: list[PairCard]
    smallest: list[PairCard]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSection:
    """What runs were trained from.

    Attributes:
        heading: Its folder and mixture.
        facts: Names and values.
        note: What cannot be said, and why; empty where nothing is missing.
        sampled: What the distributions were made from.
        histograms: Lengths and log-probabilities.
        pairs: By the reference's own margin; None where the cache cannot be read.
    """

    heading: str
    facts: list[tuple[str, str]]
    note: str
    sampled: str = ""
    histograms: tuple[Histogram, ...] = ()
    pairs: PairGroup | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PageContent:
    """The whole page."""

    run_names: list[str]
    tables: list[RunTable]
    settings: SettingsTable | None
    step_zero: list[StepZeroRow]
    charts: list[ChartCurves]
    caches: list[CacheSection]
    pairs: list[PairGroup]
    notes: list[str]

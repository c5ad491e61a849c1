"""A run's folder as a reader finds it: finished, going on, or killed in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError

METRICS = "metrics.jsonl"
Line = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairMargin:
    """The reward margin of one held-out pair, as its line of ``eval_margins.jsonl`` has it."""

    key: str
    margin: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a run has written so far.

    Attributes:
        name: What it is called on the page.
        folder: Where it lies.
        settings: Its options, as ``config.json`` has them.
        resolved: The numbers resolved from them.
        steps: Lines of ``metrics.jsonl`` with the figures of an update, in order.
        evaluations: Its lines of held-out figures, in order.
        unreadable_lines: Lines that are no line: the last one of a killed run, as a rule.
        step_zero: ``step0.json``; None where the run did not come so far.
        summary: ``summary.json``; None for a run that has not ended well.
        eval_margins: Of the last evaluation, by margin; empty where there is none.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    resolved: dict[str, Any]
    steps: list[Line]
    evaluations: list[Line]
    unreadable_lines: int
    step_zero: dict[str, Any] | None
    summary: dict[str, Any] | None
    eval_margins: list[PairMargin]

    @property
    def updates_done(self) -> int:
        """Updates whose figures were logged."""
        return int(self.steps[-1]["training_step"]) if self.steps else 0

    @property
    def total_updates(self) -> int | None:
        """Updates of the whole run."""
        total = self.resolved.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.summary is not None and self.updates_done >= (self.total_updates or 0)

    def last(self, field: str) -> float | None:
        """The last value of a field; None where it was never logged or is not finite."""
        lines = self.evaluations if field.startswith("eval/") else self.steps
        value = lines[-1].get(field) if lines else None
        return value if value is not None and math.isfinite(value) else None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that has begun."""
    return (folder / METRICS).is_file() or (folder / "step0.json").is_file()


def read_run(folder: Path, *, name: str) -> RunRecord:
    """Read what there is; what is missing or cut short leaves its place empty.

    Raises:
        DpoCacheError: The folder's files cannot be read at all.
    """
    config = _object(folder / "config.json") or {}
    lines, unreadable = metrics_lines(folder)
    margins = [line for line in _json_lines(folder / "eval_margins.jsonl") if line is not None]
    return RunRecord(
        name=name,
        folder=folder,
        settings=_part(config, "settings"),
        resolved=_part(config, "resolved"),
        steps=[line for line in lines if "train_loss" in line],
        evaluations=[line for line in lines if "train_loss" not in line],
        unreadable_lines=unreadable,
        step_zero=_object(folder / "step0.json"),
        summary=_object(folder / "summary.json"),
        eval_margins=sorted(_pair_margins(margins), key=lambda pair: (pair.margin, pair.key)),
    )


def metrics_lines(folder: Path) -> tuple[list[Line], int]:
    """What a run has logged so far: the numbers of each line, a null as not a number, and how many lines are none.

    Raises:
        DpoCacheError: The file cannot be read at all.
    """
    lines: list[Line] = []
    unreadable = 0
    for line in _json_lines(folder / METRICS):
        numbers = {name: number for name, value in (line or {}).items() if (number := _number(value)) is not None}
        if math.isfinite(numbers.get("training_step", math.nan)):
            lines.append(numbers)
        else:
            unreadable += 1
    return lines, unreadable


def logged_line(folder: Path, step: int, field: str) -> dict[str, float] | None:
    """The last line with this field that a run has logged after update ``step``; a null is not a number in it.

    Raises:
        DpoCacheError: The file cannot be read at all.
    """
    lines, _ = metrics_lines(folder)
    found = [line for line in lines if line["training_step"] == step and field in line]
    return dict(found[-1]) if found else None


def _json_lines(path: Path) -> list[dict[str, Any] | None]:
    """Each line as an object; None for one that is not."""
    content = _content(path)
    return [] if content is None else [_parsed(line) for line in content.splitlines()]


def _object(path: Path) -> dict[str, Any] | None:
    content = _content(path)
    return None if content is None else _parsed(content)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DpoCacheError(f"{path} cannot be read: {error.strerror}") from error


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _pair_margins(lines: list[dict[str, Any]]) -> list[PairMargin]:
    found = {}  # a pair that stands in the mixture twice is shown once
    for line in lines:
        key, margin = line.get("key"), _number(line.get("rewards/margin"))
        if isinstance(key, str) and margin is not None and math.isfinite(margin):
            found[key] = PairMargin(key=key, margin=margin)
    return list(found.values())


def _number(value: object) -> float | None:
    """A JSON number, or the null that stands for one that was not finite; None for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf

"""What a grid's file asks for: the points of a sweep, each a whole ``dpo-train`` run with a folder of its own.

cache: tulu3-cache            one cache for all points
output: runs/beta-and-rate    a folder for each point, and the table
build: {…}                    options of `dpo-cache build`, or a list of such, for what the cache lacks
train: {…}                    options of `dpo-train` that all points have
grid: {beta: [2, 5], …}       axes, crossed
points: [{beta: 10}, …]       points by hand, beside the grid's
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError, as_argument
from ...pipeline.data.named_path import named_path
from ..addresses.location import Location, location_of
from ..building.build_config import BuildConfig
from ..options_file import read_options_file
from ..setting import command_line_of, values_from_file
from ..training.train_config import TrainConfig

KEYS = ("cache", "output", "build", "train", "grid", "points")
LONGEST_NAME = 100
SET_BY_THE_SWEEP = {
    "cache": "all points train from the `cache` at the top of the file: give each cache its own sweep",
    "output": "each point gets its own folder under the `output` at the top of the file",
    "resume": "leave it out: points resume automatically",
    "stop_after_steps": "`dpo-sweep --strategy halving` stops points early",
    "plan": "use `dpo-sweep --plan`",
    "dry_run": "run one point by hand: `dpo-sweep --plan` prints its command",
}
"""Options of ``dpo-train`` that a sweep decides itself, and what to do instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        name: Made of the point's own options, and of nothing else: it stays when other points come and go.
        options: What the point does not share with all others, by the names of the settings.
        config: The whole configuration; its output is the point's folder.
    """

    name: str
    options: Mapping[str, Any]
    config: TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepGrid:
    """A grid's file, resolved.

    Attributes:
        cache: The cache of all points; an address where nothing has to be built.
        output: The sweep's folder.
        builds: What has to be in the cache.
        points: The runs, in the order of the file.
    """

    cache: Location
    output: Path
    builds: tuple[BuildConfig, ...]
    points: tuple[SweepPoint, ...]


def read_grid(path: Path) -> SweepGrid:
    """Read a grid's file and resolve every point of it.

    Raises:
        DpoCacheError: The file cannot be read; or, naming the point and its option, an unknown option, a value
            that is out of bounds, or two points that are the same run.
    """
    file = _read_yaml(path)
    cache, output = location_of(_text(file, "cache", path)), named_path(_text(file, "output", path))
    fixed = _options(TrainConfig, file.get("train") or {}, where=f"{path}: train")
    return SweepGrid(
        cache=cache,
        output=output,
        builds=tuple(_builds(file.get("build") or [], cache, path)),
        points=_resolve_points(list(_own_options(file, path)), fixed, cache=cache, output=output),
    )


def point_name(options: Mapping[str, Any]) -> str:
    """A folder name that says what a point's own options are: ``beta-5_learning-rate-1e-6``.

    Where that would be too long, or a value has characters that no folder name should, a few digits of the options'
    hash tell it from others that read the same.
    """
    if not options:
        return "defaults"
    written = "_".join(f"{name.replace('_', '-')}-{value_text(value)}" for name, value in options.items())
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", written).strip("-.")[:LONGEST_NAME]
    if name == written:
        return name
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()
    return f"{name}-{digest[:8]}"


def value_text(value: Any) -> str:
    """A value as people write it: 5, 1e-6, true."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number_text(value)
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _number_text(value: float) -> str:
    """In as few digits as give the number back; small ones as 5e-7."""
    digits = next(text for text in (f"{value:.{places}e}" for places in range(17)) if float(text) == value)
    mantissa, exponent = digits.split("e")
    if -4 < int(exponent) < 6:
        return repr(value).removesuffix(".0")
    return f"{mantissa}e{int(exponent)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    file = read_options_file(path)
    if not isinstance(file, dict) or not file.keys() <= set(KEYS):
        unknown = ", ".join(sorted(map(str, set(file) - set(KEYS)))) if isinstance(file, dict) else None
        raise DpoCacheError(
            f"{path}: unknown key {unknown} at the top level" if unknown else f"{path} has no keys",
            expected=f"the keys {', '.join(KEYS)}",
            next_step="put options of dpo-train that all points share under train:",
        )
    return file


def _text(file: Mapping[str, Any], key: str, path: Path) -> str:
    text = file.get(key)
    if not isinstance(text, str):
        raise DpoCacheError(f"{path}: {key} is {text!r}", expected="a folder")
    return text


def _options(config_class: type[Any], given: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise DpoCacheError(f"{where} is {given!r}", expected="option names with values")
    with _faults_located(where):
        return values_from_file(config_class, given)


def _builds(given: Any, cache: Location, path: Path) -> Iterator[BuildConfig]:
    if given and isinstance(cache, str):
        raise DpoCacheError(
            f"{path} has a build, but its cache {cache} is an address, which is read-only",
            next_step=f"dpo-cache pull {as_argument(cache)} DIR copies it to a folder",
        )
    for number, options in enumerate(given if isinstance(given, list) else [given], start=1):
        where = f"{path}: build {number}"
        values = _options(BuildConfig, options, where=where)
        refused = sorted(values.keys() & {"cache", "dry_run"})
        if refused:
            raise DpoCacheError(f"{where} sets {refused[0]}, which the sweep sets itself")
        with _faults_located(where):
            missing = [name for name in ("model", "dataset") if name not in values]
            if missing:
                raise DpoCacheError(f"{missing[0]} is missing")
            yield BuildConfig(cache=Path(cache), **values)


def _own_options(file: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The options of each point that are not those of all: of the grid first, then of the list."""
    axes = file.get("grid") or {}
    if not isinstance(axes, dict):
        raise DpoCacheError(f"{path}: grid is {axes!r}", expected="axes: option names, each with a list of values")
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise DpoCacheError(f"{path}: the axis {name} is {values!r}", expected="a list of values")
    if axes:
        for values in itertools.product(*axes.values()):
            yield _options(TrainConfig, dict(zip(axes, values, strict=True)), where=f"{path}: grid")
    listed = file.get("points") or []
    if not isinstance(listed, list):
        raise DpoCacheError(f"{path}: points is {listed!r}", expected="a list of points, each options with values")
    for number, point in enumerate(listed, start=1):
        yield _options(TrainConfig, point, where=f"{path}: point {number} of the list")
    if not axes and not listed:
        raise DpoCacheError(f"{path} has no points", expected="axes under grid:, or a list under points:")


def _resolve_points(
    own_options: list[dict[str, Any]], fixed: Mapping[str, Any], *, cache: Location, output: Path
) -> tuple[SweepPoint, ...]:
    points: list[SweepPoint] = []
    for options in own_options:
        name = point_name(options)
        values = {**fixed, **options}
        refused = sorted(values.keys() & SET_BY_THE_SWEEP.keys())
        if refused:
            where = f"the axis {refused[0]}" if refused[0] in options else f"train: {refused[0]}"
            raise DpoCacheError(f"{where} cannot be set in a sweep", next_step=SET_BY_THE_SWEEP[refused[0]])
        with _faults_located(f"point {name}"):
            points.append(
                SweepPoint(name=name, options=options, config=TrainConfig(cache=cache, output=output / name, **values))
            )
    _refuse_duplicates(points)
    return tuple(points)


def _refuse_duplicates(points: list[SweepPoint]) -> None:
    names: set[str] = set()
    runs: dict[tuple[str, ...], str] = {}
    for point in points:
        if point.name in names:
            raise DpoCacheError(f"the point {point.name} is listed twice", next_step="remove one of them")
        names.add(point.name)
        other = runs.setdefault(tuple(command_line_of(replace(point.config, output=Path()))), point.name)
        if other != point.name:
            raise DpoCacheError(f"the points {other} and {point.name} are the same run", next_step="remove one of them")


@contextmanager
def _faults_located(where: str) -> Iterator[None]:
    """Put the part of the file in front of the message of a fault."""
    try:
        yield
    except DpoCacheError as fault:
        raise fault.located(where) from fault

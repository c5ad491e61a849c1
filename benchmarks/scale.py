"""What a cache of a million pairs costs: time, memory and bytes, beside one of a tenth of it.

    python benchmarks/scale.py
    python benchmarks/scale.py --folder WORK --only build     one step at a time, going on where the last one ended

The pairs are short and go through all of stage one but the model, whose values are made up. Each figure is taken by
a process of its own; memory is what that process needed at most on top of what its imports take, without the files
it has mapped. A table is kept in ``benchmarks/results/scale.md`` once every figure is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import synthetic_cache  # noqa: E402
from command_line import benchmark_parser  # noqa: E402
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache  # noqa: E402
from dpo_cache.pipeline.cache.mixture import Mixture  # noqa: E402
from dpo_cache.pipeline.cache.mixture_check import check_mixture  # noqa: E402
from dpo_cache.pipeline.cache.pair_order import epoch_order  # noqa: E402
from dpo_cache.pipeline.cache.pair_stream import PairStream  # noqa: E402
from dpo_cache.stages.building.build_cache import damaged_shards  # noqa: E402
from dpo_cache.stages.building.build_config import BuildConfig  # noqa: E402
from dpo_cache.stages.building.mixture_change import mixture_content  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from result_table import dated_section, keep_section, machine, markdown_table  # noqa: E402

PAIRS_AT_ONCE = 128
FIGURES = "figures.json"
Figures = dict[str, Any]


def main() -> None:
    options = parse_options()
    if options.step:
        print(json.dumps(measured(STEPS[options.step], options.folder)))
        return
    if options.folder is not None:
        measure_in(options.folder, options)
        return
    with tempfile.TemporaryDirectory(prefix="dpo-cache-scale-") as folder:
        measure_in(Path(folder), options)


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs=2, default=(100_000, 1_000_000), metavar="PAIRS")
    parser.add_argument("--folder", type=Path, help="keep caches and figures here [default: in a temporary folder]")
    parser.add_argument("--only", nargs="+", choices=sorted(STEPS), help="measure these alone, again if need be")
    parser.add_argument("--only-size", type=int, help="measure this size alone", metavar="PAIRS")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)  # one figure, for the main process
    return parser.parse_args()


def measure_in(folder: Path, options: argparse.Namespace) -> None:
    for num_pairs in [options.only_size] if options.only_size else options.sizes:
        measure(work_folder(folder, num_pairs), options.only)
    columns = [known_figures(work_folder(folder, num_pairs)) for num_pairs in options.sizes]
    if all(set(STEPS) <= set(figures) for figures in columns):
        keep_section("scale", section(columns, options.sizes))


# ---- the steps, each in a process of its own -----------------------------------------------------------------------


def opened(folder: Path) -> tuple[ReferenceCache, Mixture]:
    cache = ReferenceCache.open(folder / synthetic_cache.CACHE)
    return cache, cache.read_mixture("train")


def plan_again(folder: Path) -> None:
    """All that a build does where nothing is left to score."""
    cache, _ = opened(folder)
    with tempfile.TemporaryDirectory() as scratch:
        known = cache.shards.key_index(without=damaged_shards(cache))
        collected = synthetic_cache.collect(folder, known=known, spool=Path(scratch) / "pairs.arrow")
    assert len(collected.waiting) == 0
    config = BuildConfig(model="made up", dataset=("pairs.jsonl",), cache=cache.path)
    assert not mixture_content(cache, config, collected.content, known=known).is_new


def train_through(folder: Path) -> None:
    """An epoch as training visits it."""
    cache, mixture = opened(folder)
    order = epoch_order(
        num_pairs=mixture.num_pairs, block_rows=mixture.block_rows, seed=0, epoch=0, mixture_digest=mixture.digest
    )
    stream = PairStream(cache, mixture)
    for start in range(0, len(order), PAIRS_AT_ONCE):
        stream.read(order[start : start + PAIRS_AT_ONCE])
    stream.close()


def info(folder: Path) -> None:
    """The command, as people type it."""
    command = [sys.executable, "-m", "dpo_cache", "info", str(folder / synthetic_cache.CACHE)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def sizes(folder: Path) -> dict[str, float]:
    """No step that takes long: what lies on the disk."""
    cache, mixture = opened(folder)
    return {
        "ids": sum(mixture.num_ids.values()) / mixture.num_pairs,
        "shards": sum(path.stat().st_size for path in cache.shards.paths()) / mixture.num_pairs,
        "table": mixture.table.num_bytes / mixture.num_pairs,
    }


STEPS: dict[str, Callable[[Path], object]] = {
    "build": synthetic_cache.build,
    "info": info,
    "open": opened,
    "check": lambda folder: check_mixture(*opened(folder)),
    "index": lambda folder: opened(folder)[0].shards.key_index(),
    "plan": plan_again,
    "stream": train_through,
}


def measured(step: Callable[[Path], object], folder: Path) -> dict[str, float]:
    with PeakMemory() as memory:
        started = time.perf_counter()
        step(folder)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "mib": memory.growth, "peak_mib": memory.peak}


# ---- measuring -----------------------------------------------------------------------------------------------------


def work_folder(folder: Path, num_pairs: int) -> Path:
    """Where the pairs and the cache of this size lie; the pairs are written if they are not there."""
    place = folder / str(num_pairs)
    if not (place / synthetic_cache.PAIRS).exists():
        place.mkdir(parents=True, exist_ok=True)
        synthetic_cache.write_pairs(place, num_pairs)
    return place


def measure(folder: Path, only: list[str] | None) -> None:
    """Take the figures that are missing, or those named."""
    figures = known_figures(folder)
    for step in only or [step for step in STEPS if step not in figures]:
        if step == "build":
            shutil.rmtree(folder / synthetic_cache.CACHE, ignore_errors=True)
        figures[step] = in_a_process(step, folder)
        (folder / FIGURES).write_text(json.dumps(figures), encoding="utf-8")


def known_figures(folder: Path) -> Figures:
    path = folder / FIGURES
    figures: Figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return figures | (sizes(folder) if "build" in figures else {})


def in_a_process(step: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{folder.name}: {step}: {figures['seconds']:.1f} s, {figures['mib']:.0f} MiB", file=sys.stderr)
    return figures


# ---- the table -----------------------------------------------------------------------------------------------------


def section(columns: list[Figures], num_pairs: Sequence[int]) -> str:
    """A Markdown section."""

    def row(name: str, of: Callable[[Figures], float], unit: str = "", digits: int = 0) -> list[str]:
        few, many = map(of, columns)
        texts = [f"{value:,.{digits}f} {unit}".strip() for value in (few, many)]
        return [name, *texts, f"{many / few if few else 0:.2f}"]

    def both(step: str, name: str, digits: int = 2) -> list[list[str]]:
        return [
            row(name, lambda figures: figures[step]["seconds"], "s", digits),
            row(f"{name}: memory", lambda figures: figures[step]["mib"], "MiB"),
        ]

    pairs_per_second = [count / figures["stream"]["seconds"] for count, figures in zip(num_pairs, columns, strict=True)]
    rows = [
        row("`dpo-cache info`, whole process", lambda figures: figures["info"]["seconds"], "s", 2),
        row("open cache and mixture", lambda figures: figures["open"]["seconds"], "s", 3),
        *both("check", "check before training"),
        *both("index", "index of keys"),
        *both("plan", "build with nothing left to score"),
        *both("build", "build without the model"),
        [
            "an epoch, pairs per second",
            *(f"{rate:,.0f}" for rate in pairs_per_second),
            f"{pairs_per_second[1] / pairs_per_second[0]:.2f}",
        ],
        row("an epoch: memory", lambda figures: figures["stream"]["mib"], "MiB"),
        row("an epoch: memory, imports included", lambda figures: figures["stream"]["peak_mib"], "MiB"),
        row("token ids per pair", lambda figures: figures["ids"], digits=1),
        row("bytes per pair in shards", lambda figures: figures["shards"], digits=1),
        row("bytes per pair in the table", lambda figures: figures["table"], digits=1),
    ]
    return dated_section(
        f"{num_pairs[1]:,} pairs",
        markdown_table(("", *(f"{count:,} pairs" for count in num_pairs), "ratio"), rows),
        f"{machine('pyarrow', 'numpy')}. Repeat with `python benchmarks/scale.py`.",
    )


if __name__ == "__main__":
    main()

"""What a cache of a million pairs costs: time, memory and bytes, beside one of a tenth of it.

    python benchmarks/scale.py

The pairs are short and go through all of stage one but the model, whose values are made up. Each figure is taken by
a process of its own; memory is what that process needed at most on top of what its imports take, without the files
it has mapped. A table is appended to ``benchmarks/results/scale.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import synthetic_cache  # noqa: E402
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache  # noqa: E402
from dpo_cache.pipeline.cache.mixture import Mixture  # noqa: E402
from dpo_cache.pipeline.cache.mixture_check import check_mixture  # noqa: E402
from dpo_cache.pipeline.cache.pair_order import epoch_order  # noqa: E402
from dpo_cache.pipeline.cache.pair_stream import PairStream  # noqa: E402
from dpo_cache.stages.build import damaged_shards  # noqa: E402
from dpo_cache.stages.build_config import BuildConfig  # noqa: E402
from dpo_cache.stages.mixture_change import mixture_content  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from result_table import processor_name  # noqa: E402

RESULTS = HERE / "results" / "scale.md"
PAIRS_AT_ONCE = 128


def main() -> None:
    options = parse_options()
    if options.step:
        print(json.dumps(measured(STEPS[options.step], options.folder)))
        return
    columns = []
    for num_pairs in (options.num_pairs // 10, options.num_pairs):
        with tempfile.TemporaryDirectory(prefix="dpo-cache-scale-", dir=options.folder) as folder:
            columns.append(measure_all(Path(folder), num_pairs))
    text = table(columns[0], columns[1], options.num_pairs)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as results:
        results.write(text + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where there is room for half a gigabyte [default: the usual]")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)  # one figure, for the main process
    return parser.parse_args()


# ---- the steps, each in a process of its own -----------------------------------------------------------------------


def opened(folder: Path) -> tuple[ReferenceCache, Mixture]:
    cache = ReferenceCache.open(folder / synthetic_cache.CACHE)
    return cache, cache.read_mixture("train")


def plan_again(folder: Path) -> None:
    """All that a build does where nothing is left to score."""
    cache, _ = opened(folder)
    with tempfile.TemporaryDirectory() as scratch:
        known = cache.key_index(without=damaged_shards(cache))
        collected = synthetic_cache.collect(folder, known=known, spool=Path(scratch) / "pairs.arrow")
    assert len(collected.waiting) == 0
    config = BuildConfig(model="made up", dataset=("pairs.jsonl",), cache=cache.path)
    assert not mixture_content(cache, config, collected, warn=print).is_new


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


STEPS: dict[str, Callable[[Path], object]] = {
    "build": synthetic_cache.build,
    "open": opened,
    "check": lambda folder: check_mixture(*opened(folder)),
    "index": lambda folder: opened(folder)[0].key_index(),
    "plan": plan_again,
    "stream": train_through,
}


def measured(step: Callable[[Path], object], folder: Path) -> dict[str, float]:
    with PeakMemory() as memory:
        started = time.perf_counter()
        step(folder)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "mib": memory.growth, "peak_mib": memory.peak}


# ---- the table -----------------------------------------------------------------------------------------------------


def measure_all(folder: Path, num_pairs: int) -> dict[str, Any]:
    synthetic_cache.write_pairs(folder, num_pairs)
    figures: dict[str, Any] = {step: in_a_process(step, folder) for step in STEPS}
    figures["info"] = seconds_of_info(folder)
    cache, mixture = opened(folder)
    figures["ids"] = sum(mixture.num_ids.values()) / num_pairs
    figures["shards"] = sum(path.stat().st_size for path in cache.shard_paths()) / num_pairs
    figures["table"] = mixture.table.num_bytes / num_pairs
    figures["spread"] = float(np.mean([shard.num_rows for shard in mixture.shards]))
    return figures


def in_a_process(step: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{step}: {figures['seconds']:.1f} s, {figures['mib']:.0f} MiB", file=sys.stderr)
    return figures


def seconds_of_info(folder: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "dpo_cache", "info", str(folder / synthetic_cache.CACHE)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def table(small: dict[str, Any], large: dict[str, Any], num_pairs: int) -> str:
    def row(name: str, unit: str, of: Callable[[dict[str, Any]], float], digits: int = 0) -> str:
        few, many = of(small), of(large)
        return f"| {name} | {few:,.{digits}f} {unit} | {many:,.{digits}f} {unit} | {many / few if few else 0:.2f} |"

    def both(step: str, name: str) -> list[str]:
        return [
            row(name, "s", lambda figures: figures[step]["seconds"], 2),
            row(f"{name}: memory", "MiB", lambda figures: figures[step]["mib"]),
        ]

    lines = [
        f"| {datetime.now(UTC):%Y-%m-%d} | {num_pairs // 10:,} pairs | {num_pairs:,} pairs | times |",
        "| --- | ---: | ---: | ---: |",
        row("`dpo-cache info`, a process", "s", lambda figures: figures["info"], 2),
        row("open cache and mixture", "s", lambda figures: figures["open"]["seconds"], 3),
        *both("check", "check before training"),
        *both("index", "index of keys"),
        *both("plan", "build with nothing left to score"),
        *both("build", "build but for the model"),
        row("an epoch in training's order, pairs a second", "", lambda f: 0),
        row("an epoch: memory", "MiB", lambda figures: figures["stream"]["mib"]),
        row("an epoch: memory, imports and all", "MiB", lambda figures: figures["stream"]["peak_mib"]),
        row("token ids of a pair", "", lambda figures: figures["ids"], 1),
        row("bytes of a pair in shards", "", lambda figures: figures["shards"], 1),
        row("bytes of a pair in the table", "", lambda figures: figures["table"], 1),
    ]
    rates = [count / figures["stream"]["seconds"] for count, figures in ((num_pairs // 10, small), (num_pairs, large))]
    place = next(number for number, line in enumerate(lines) if "pairs a second" in line)
    lines[place] = f"| an epoch, pairs a second | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[1] / rates[0]:.2f} |"
    return "\n".join(lines) + "\n\n" + circumstances() + "\n"


def circumstances() -> str:
    return (
        f"{processor_name()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}. "
        "Repeat with `python benchmarks/scale.py`."
    )


if __name__ == "__main__":
    main()

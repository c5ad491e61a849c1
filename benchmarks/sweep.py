"""What a sweep costs with the reference recomputed for every point, and cached once.

    python benchmarks/sweep.py --pairs hh_harmless.jsonl.gz

Both sides train the same points with the same commands, taking turns in one run: ``dpo-train`` in a process of its own
for each point. One side builds the cache once, before the first point; the other builds it into a fresh folder before
every point, which is what a trainer does that computes its reference log-probabilities anew in every run. Everything
between the first command and the last is counted, imports and loading included. The reference is a random Llama of 34M
parameters; the ratio of scoring to training is that of the two passes, whatever the size. (A trainer that carries the
reference through training pays the same forward passes, and its memory.)

It writes ``results/sweep.md`` (a section a run), ``results/sweep.svg`` and ``results/sweep.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from command_line import add_pairs, add_threads, benchmark_parser
from dpo_cache.stages.console.counted_noun import counted
from result_table import (
    LOAD_BEFORE,
    RESULTS,
    dated_section,
    keep_section,
    markdown_table,
    processor_name,
    threads_of_machine,
)
from small_llama import NUM_PARAMETERS, write_random_llama

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

BETAS = (2, 5, 10, 20)
RATES = (5e-7, 1e-6)
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
STARTING, FORWARDS, TRAINING = "#c9ced6", "#c2562d", "#3b6ea5"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One command of one side.

    Attributes:
        kind: ``build`` or ``train``.
        point: Its place in the sweep, from 0; the one build for all has that of the first.
        seconds: Wall time of its process.
        forwards: Forward passes of the reference, of a build.
        in_forwards_s: Seconds in them.
        loss: Loss of the last update, for a training.
    """

    kind: str
    point: int
    seconds: float
    forwards: int = 0
    in_forwards_s: float = 0.0
    loss: float | None = None


def main() -> None:
    options = parse_options()
    points = list(itertools.product(BETAS, RATES))[: options.points]
    with tempfile.TemporaryDirectory(prefix="dpo-cache-benchmark-") as name:
        workplace = Workplace(Path(name), options)
        workplace.warm_up()
        cached, recomputed = measure(workplace, points)
    losses = [[piece.loss for piece in side if piece.loss is not None] for side in (cached, recomputed)]
    assert all(math.isclose(*both, rel_tol=1e-5) for both in zip(*losses, strict=True)), "the sides trained differently"
    keep_section("sweep", section(options, cached, recomputed))
    draw(options, parts_of(cached), parts_of(recomputed))


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add_pairs(parser)
    parser.add_argument("--num-pairs", type=int, default=48, help="how many of them")
    parser.add_argument("--points", type=int, default=8, choices=range(1, 9), help="points of the sweep")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs in a run")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--dollars-per-hour", type=float, default=2.0, help="price of the machine")
    add_threads(parser)
    return parser.parse_args()


# ---- measuring -------------------------------------------------------------------------------------------------


class Workplace:
    """A folder with a reference, and the two commands on it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self._model = write_random_llama(folder / "model", options.pairs)

    def warm_up(self) -> None:
        """Files into memory, byte code compiled: neither side's first command pays for that."""
        self.build("warm-up-cache", point=-1)
        self.train("warm-up-cache", "warm-up-run", point=-1, beta=BETAS[0], rate=RATES[0])

    def build(self, cache: str, *, point: int) -> Piece:
        """``dpo-cache build`` into a cache of this name."""
        dataset = f"{self._options.pairs},amount={self._options.num_pairs}"
        arguments = ("build", "--model", self._model, "--dataset", dataset, "--cache", self._folder / cache)
        seconds, report = self._run(*arguments)
        in_forwards = float(report["forward_seconds"])
        forwards = int(report["reference_forwards"])
        return Piece(kind="build", point=point, seconds=seconds, forwards=forwards, in_forwards_s=in_forwards)

    def train(self, cache: str, output: str, *, point: int, beta: float, rate: float) -> Piece:
        """``dpo-train`` from that cache."""
        seconds, report = self._run(
            *("train", "--cache", self._folder / cache, "--output", self._folder / output),
            *("--beta", beta, "--learning-rate", rate, "--num-train-epochs", self._options.epochs),
            *("--global-batch-size", self._options.global_batch_size),
        )
        shutil.rmtree(self._folder / output)
        return Piece(kind="train", point=point, seconds=seconds, loss=float(report["last"]["train_loss"]))

    def _run(self, *arguments: object) -> tuple[float, dict[str, Any]]:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "dpo_cache", *map(str, arguments), "--json"],
            env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(self._options.threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        return time.perf_counter() - started, json.loads(done.stdout)


def measure(workplace: Workplace, points: Sequence[tuple[float, float]]) -> tuple[list[Piece], list[Piece]]:
    """The pieces of both sides; point by point in turns, so that what else the machine does meets both alike."""
    cached, recomputed = [workplace.build("once", point=0)], []
    for number, (beta, rate) in enumerate(points):
        cached.append(workplace.train("once", f"cached-{number}", point=number, beta=beta, rate=rate))
        recomputed.append(workplace.build(f"fresh-{number}", point=number))
        again = workplace.train(f"fresh-{number}", f"recomputed-{number}", point=number, beta=beta, rate=rate)
        recomputed.append(again)
        print(f"point {number + 1} of {len(points)}: {cached[-1].seconds:.1f} s of training", file=sys.stderr)
    return cached, recomputed


# ---- showing ---------------------------------------------------------------------------------------------------


def seconds_of(pieces: Sequence[Piece], kind: str | None = None) -> float:
    """Seconds of all pieces, or of those of a kind."""
    return sum(piece.seconds for piece in pieces if kind in (None, piece.kind))


def section(options: argparse.Namespace, cached: Sequence[Piece], recomputed: Sequence[Piece]) -> str:
    """A Markdown section."""
    sides = (recomputed, cached)
    rows = [
        ("times the reference was scored", [f"{sum(piece.kind == 'build' for piece in side)}" for side in sides]),
        ("forward passes of the reference", [f"{sum(piece.forwards for piece in side)}" for side in sides]),
        ("seconds of the builds", [f"{seconds_of(side, 'build'):.1f}" for side in sides]),
        ("of those, in forward passes", [f"{sum(piece.in_forwards_s for piece in side):.1f}" for side in sides]),
        ("seconds of the training runs", [f"{seconds_of(side, 'train'):.1f}" for side in sides]),
        ("seconds in total", [f"{seconds_of(side):.1f}" for side in sides]),
        (f"dollars, at {options.dollars_per_hour:g} per hour", [f"{dollars(options, side):.3f}" for side in sides]),
    ]
    saved_s = seconds_of(recomputed) - seconds_of(cached)
    in_forwards_s, in_starts_s = (parts_of(recomputed)[part] - parts_of(cached)[part] for part in (FORWARDS, STARTING))
    return dated_section(
        f"{options.points} points, {Path(options.pairs).name}",
        f"{options.num_pairs} pairs, {counted(options.epochs, 'epoch')} in global batches of "
        f"{options.global_batch_size}; a Llama of {NUM_PARAMETERS / 1e6:.0f}M parameters, float32, "
        f"{threads_of_machine(options.threads)}; wall time of whole processes, "
        f"the two sides alternating; load average before the run: {LOAD_BEFORE:.1f}.",
        markdown_table(
            ("", "recomputed for each point", "cached once"), [(title, *figures) for title, figures in rows]
        ),
        f"Cached once, the sweep takes {saved_s / seconds_of(recomputed):.0%} less time: {saved_s:.1f} s. Of these, "
        f"{in_forwards_s:.1f} s are forward passes of the reference; {in_starts_s:.1f} s are the start of "
        f"{options.points - 1} more `dpo-cache build` processes (imports, reading the data, loading the model), "
        "a part that shrinks with more data.",
    )


def dollars(options: argparse.Namespace, pieces: Sequence[Piece]) -> float:
    """What the time of these pieces costs."""
    return seconds_of(pieces) / 3600 * float(options.dollars_per_hour)


def parts_of(pieces: Sequence[Piece]) -> dict[str, float]:
    """Seconds by what they went into, in the order they are drawn."""
    in_forwards = sum(piece.in_forwards_s for piece in pieces)
    return {
        STARTING: seconds_of(pieces, "build") - in_forwards,
        FORWARDS: in_forwards,
        TRAINING: seconds_of(pieces, "train"),
    }


def draw(options: argparse.Namespace, cached: Mapping[str, float], recomputed: Mapping[str, float]) -> None:
    """Both sides as bars of time, by what it went into: most of what the cache saves here is starting processes."""
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    sides = (("reference\ncached once", cached), ("reference\nrecomputed\nfor each point", recomputed))
    for height, (_, parts) in enumerate(sides):
        start = 0.0
        for color, seconds in parts.items():
            axes.barh(height, seconds / 60, left=start / 60, color=color, edgecolor="white", height=0.62)
            start += seconds
        cost = start / 3600 * options.dollars_per_hour
        axes.text(start / 60, height, f" {start / 60:.1f} min, ${cost:.2f}", va="center", fontweight="bold")
    axes.set_yticks(range(len(sides)), [label for label, _ in sides])
    axes.set_xlim(right=max(sum(parts.values()) for _, parts in sides) / 60 * 1.2)
    axes.set_xlabel(
        f"minutes, measured: a sweep of {options.points} points, {processor_name()}, at "
        f"${options.dollars_per_hour:g} per hour"
    )
    axes.legend(
        handles=[
            Patch(color=STARTING, label="starting dpo-cache build"),
            Patch(color=FORWARDS, label="forward passes of the reference"),
            Patch(color=TRAINING, label="dpo-train, its start included"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for name in ("sweep.svg", "sweep.png"):
        figure.savefig(
            RESULTS / name, dpi=200, facecolor="white", metadata={"Date": None} if name.endswith("svg") else {}
        )


if __name__ == "__main__":
    main()

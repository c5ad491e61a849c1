"""How fast and how lean stage two trains, against TRL's DPOTrainer with precomputed references.

    python -m venv TRL_ENV && TRL_ENV/bin/pip install trl==1.16.0 torch
    python benchmarks/train.py --trl-python TRL_ENV/bin/python --pairs hh_harmless.jsonl.gz

Both train the same model on the same token ids in the same order with the same global batch, loss, optimizer and
number of threads, in float32 on a CPU, every run in a process of its own, taking turns. TRL runs at each of several
batch sizes, ours through DeepSpeed at two ZeRO stages and three token budgets, both also at their leanest, with
gradient checkpointing. Every update but the first is timed; memory is the most a process ever had resident. Medians
count. A table is appended to ``benchmarks/results/train.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import add_pairs, add_threads, add_trl, benchmark_parser
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.pair_stream import PairStream
from dpo_cache.stages.console.counted_noun import counted
from dpo_cache.stages.training.recipe import global_batches
from result_table import LOAD_BEFORE, dated_section, keep_section, markdown_table, threads_of_machine
from small_llama import NUM_PARAMETERS, write_random_llama

MODEL_STATE_GB = NUM_PARAMETERS * 4 * 4 / 1e9
"""Weights, gradients and AdamW's two moments in float32."""


def main() -> None:
    options = parse_options()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory(prefix="dpo-cache-benchmark-") as name:
        folder = Path(name)
        model_folder = write_random_llama(folder / "model", options.pairs)
        cache = build_cache(options, model_folder, folder / "cache")
        contenders = [*our_contenders(options, cache, folder), *trl_contenders(options, cache, model_folder)]
        for number in range(options.repeats):
            for contender in contenders:
                contender.measure()
                print(f"round {number + 1}: {contender.name}: {contender.seconds[-1]:.2f} s", file=sys.stderr)
    keep_section("train", table_of(options, contenders))


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add_trl(parser)
    add_pairs(parser)
    parser.add_argument("--global-batch-size", type=int, default=8, help="pairs of one update")
    parser.add_argument("--steps", type=int, default=8, help="updates of a run, the first one untimed")
    parser.add_argument("--trl-batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--loss", default="dpo_norm", choices=("dpo", "dpo_norm"))
    add_threads(parser)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def build_cache(options: argparse.Namespace, model_folder: Path, cache: Path) -> Path:
    """Exactly the pairs of the updates, so that the longest of them decides the default token budget."""
    # Some rows of real data make no pair.
    amount = round(options.steps * options.global_batch_size * 1.05)
    command = [*("build", "--model", model_folder, "--cache", cache), "--dataset", f"{options.pairs},amount={amount}"]
    run_ours([str(argument) for argument in command])
    return cache


def run_ours(arguments: list[str]) -> dict[str, Any]:
    """A command of ours to its end, and its report."""
    done = subprocess.run(
        [sys.executable, "-m", "dpo_cache", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# ---- who takes part --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Contender:
    """One way to train, and what its runs so far took.

    Attributes:
        name: In the table.
        seconds: Of all updates but the first, a run each.
        peak_gb: Most memory the process had resident, a run each.
        losses: Of the last run, an update each.
    """

    name: str
    pairs_timed: int
    seconds: list[float] = field(default_factory=list)
    peak_gb: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One run."""
        raise NotImplementedError

    @property
    def pairs_per_second(self) -> float:
        return self.pairs_timed / statistics.median(self.seconds)

    @property
    def memory_gb(self) -> float:
        return statistics.median(self.peak_gb)


@dataclass(kw_only=True)
class Ours(Contender):
    """``dpo-train`` with these options."""

    arguments: list[str]
    output: Path

    def measure(self) -> None:
        output = self.output / str(len(self.seconds))
        run_ours(["train", *self.arguments, "--output", str(output)])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "train_loss" in line]
        batch = self.pairs_timed / (len(steps) - 1)
        self.seconds.append(sum(batch / line["perf/pairs_per_second"] for line in steps[1:]))
        self.peak_gb.append(steps[-1]["perf/peak_memory_gib"] * 2**30 / 1e9)
        self.losses = [line["train_loss"] for line in steps]


@dataclass(kw_only=True)
class Trl(Contender):
    """TRL's trainer on this job."""

    python: str
    job: dict[str, Any]

    def measure(self) -> None:
        done = subprocess.run(
            [self.python, Path(__file__).with_name("train_trl.py")],
            input=json.dumps(self.job),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        answer = json.loads(done.stdout.splitlines()[-1])  # libraries print before
        self.seconds.append(sum(step["seconds"] for step in answer["steps"][1:]))
        self.peak_gb.append(answer["peak_kib"] * 1024 / 1e9)
        self.losses = [step["loss"] for step in answer["steps"]]


def our_contenders(options: argparse.Namespace, cache: Path, folder: Path) -> Iterator[Ours]:
    common = ["--cache", str(cache), "--max-steps", str(options.steps), "--loss", options.loss]
    common += ["--global-batch-size", str(options.global_batch_size), "--warmup-ratio", str(1 / options.steps)]
    ways = {
        "micro-batches as long as the longest pair": [],
        "one pair per micro-batch": ["--tokens-per-microbatch", "1"],
        "one pair per micro-batch, gradient checkpointing": [
            "--tokens-per-microbatch",
            "1",
            "--gradient-checkpointing",
        ],
        "all pairs of an update in one micro-batch": ["--tokens-per-microbatch", "1000000"],
    }
    for stage in (0, 3):
        for number, (name, settings) in enumerate(ways.items()):
            yield Ours(
                name=f"ours, --zero-stage {stage}, {name}",
                pairs_timed=(options.steps - 1) * options.global_batch_size,
                arguments=[*common, "--zero-stage", str(stage), *settings],
                output=folder / f"ours-{stage}-{number}",
            )


def trl_contenders(options: argparse.Namespace, cache: Path, model_folder: Path) -> Iterator[Trl]:
    pairs = pairs_in_training_order(options, cache)
    smallest = min(options.trl_batch_sizes)
    for batch_size, checkpointing in [(smallest, True), *((size, False) for size in options.trl_batch_sizes)]:
        accumulation = options.global_batch_size // batch_size
        yield Trl(
            name=f"TRL, {counted(batch_size, 'pair')} × {accumulation}"
            f"{', gradient checkpointing' if checkpointing else ''}",
            pairs_timed=(options.steps - 1) * options.global_batch_size,
            python=options.trl_python,
            job={
                "model": str(model_folder),
                "dtype": "float32",
                "threads": options.threads,
                "pairs": pairs,
                "batch_size": batch_size,
                "accumulation": accumulation,
                "gradient_checkpointing": checkpointing,
                "steps": options.steps,
                "loss": {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}[options.loss],
                "beta": {"dpo": 0.1, "dpo_norm": 5.0}[options.loss],
                "learning_rate": 5e-7,
                "warmup_steps": 1,
            },
        )


def pairs_in_training_order(options: argparse.Namespace, folder: Path) -> list[list[Any]]:
    """Token ids and reference values of every global batch, one after the other."""
    cache = ReferenceCache.open(folder)
    mixture: Mixture = cache.read_mixture("train")
    stream, plan = PairStream(cache, mixture), global_batches(mixture, options.global_batch_size, 42)
    assert plan.steps_per_epoch > options.steps, "a short batch of an epoch's end is averaged otherwise by TRL"
    return [
        [
            *(ids.tolist() for ids in (row.pair.prompt_ids, row.pair.chosen_ids, row.pair.rejected_ids)),
            row.ref_chosen_logps,
            row.ref_rejected_logps,
        ]
        for step in range(options.steps)
        for row in stream.read(plan.rows(step))
    ]


# ---- what came out ---------------------------------------------------------------------------------------------


def table_of(options: argparse.Namespace, contenders: list[Contender]) -> str:
    """A Markdown section."""
    trl = [contender for contender in contenders if isinstance(contender, Trl)]
    fastest = max(trl, key=lambda contender: contender.pairs_per_second)
    leanest = min(trl, key=lambda contender: contender.memory_gb)
    apart = max(
        abs(one - other)
        for contender in contenders
        for one, other in zip(contender.losses, fastest.losses, strict=True)
    )
    rows = [
        (
            f"{contender.name}{_mark(contender, fastest, leanest)}",
            f"{contender.pairs_per_second:.2f}",
            f"{contender.pairs_per_second / fastest.pairs_per_second:.2f}",
            f"{contender.memory_gb:.2f}",
            f"{contender.memory_gb - MODEL_STATE_GB:.2f}",
        )
        for contender in contenders
    ]
    return dated_section(
        f"{Path(options.pairs).name}, float32",
        f"A Llama of {NUM_PARAMETERS / 1e6:.0f}M parameters, {options.loss}, {options.global_batch_size} pairs per "
        f"update, {options.steps} updates; {threads_of_machine(options.threads)}; medians of "
        f"{options.repeats} interleaved runs; load average before the run: {LOAD_BEFORE:.1f}.",
        markdown_table(
            (
                "trainer",
                "pairs/s",
                "times TRL's fastest",
                "peak memory, GB",
                "of it beyond weights, gradients, optimizer",
            ),
            rows,
        ),
        f"All losses agree to within {apart:.1e} over these updates.",
    )


def _mark(contender: Contender, fastest: Contender, leanest: Contender) -> str:
    marks = [mark for mark, holder in (("fastest", fastest), ("leanest", leanest)) if contender is holder]
    return f" (TRL's {' and '.join(marks)})" if marks else ""


if __name__ == "__main__":
    main()

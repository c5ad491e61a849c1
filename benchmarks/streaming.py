"""What reading from a cache costs a training run: in every update, before the first one, and in memory.

    python benchmarks/streaming.py --pairs hh_harmless.jsonl.gz --folder WORK

Real ``dpo-train`` processes on a CPU, with a clock around their parts. Waiting for pairs is the time in which an update
has nothing to compute, because a thread is still reading, checking and laying out its pairs. It is measured with a
Llama of 34M parameters on real pairs; the time before the first update, and the memory, with a very small model on
caches of a thousand to a million short pairs (made as ``benchmarks/scale.py`` makes them, and kept in WORK). Medians
count. Two sections are kept in ``benchmarks/results/streaming.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import synthetic_cache  # noqa: E402
from command_line import add_pairs, add_threads, benchmark_parser  # noqa: E402
from result_table import dated_section, keep_section, machine, markdown_table  # noqa: E402
from scale import measure, work_folder  # noqa: E402
from small_llama import NUM_PARAMETERS, write_random_llama  # noqa: E402
from tiny_model import tiny_tokenizer, write_tiny_model  # noqa: E402

Span = tuple[str, float, float]
"""A part of a run, and the seconds since the process was started at which it began and ended."""

IMPORTS = "interpreter, imports, command line"
JOIN = "the one rank's process group"
CACHE = "cache opened and checked, settings resolved"
LENGTHS = "lengths of all pairs"
PROOF = "check at step 0"
UPDATE = "an update"
READ = "waiting for pairs"
LOAD = "loading the model and DeepSpeed's engine"
PAIRS_OF_UPDATE = 8
REPEAT = "Repeat with `python benchmarks/streaming.py --pairs … --folder …`."


def main() -> None:
    options = parse_options()
    if options.run is not None:
        print(json.dumps(timed_run(options.run)))
        return
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory(prefix="dpo-cache-benchmark-") as scratch:
        if "waiting" in options.only:
            keep_section("streaming", waiting_section(options, Path(scratch)))
        if "start" in options.only:
            keep_section("streaming", start_section(options, Path(scratch)))


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add_pairs(parser)
    add_threads(parser)
    parser.add_argument("--folder", type=Path, required=True, help="where the large caches are kept between runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=(1_000, 100_000, 1_000_000), help="pairs in them")
    parser.add_argument("--updates", type=int, default=8, help="updates of the run on real pairs, the first untimed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("waiting", "start"), default=("waiting", "start"))
    # One run of dpo-train with these arguments and clocks around its parts, for the main process.
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- one run, in a process of its own ------------------------------------------------------------------------------


def timed_run(arguments: list[str]) -> dict[str, Any]:
    """``dpo-train`` with these arguments; its spans, and the most memory it had resident, in MiB."""
    spans: list[Span] = []
    started = psutil.Process().create_time()
    import deepspeed
    from dpo_cache.cli import dpo_train
    from dpo_cache.stages.processes import background
    from dpo_cache.stages.training import prepared_run, started_run, training_loop, training_run

    for owner, name, part in (
        (prepared_run, "_open_pairs", CACHE),
        (training_run, "prove_step_zero", PROOF),
        (started_run, "load_policy", LOAD),
        (started_run, "PolicyEngine", LOAD),
        (started_run, "choose_layout", LOAD),
        (started_run, "MicroBatches", LENGTHS),
        (training_loop.TrainingLoop, "_update", UPDATE),
        (background.ReadAhead, "_next", READ),
        (deepspeed, "init_distributed", JOIN),
    ):
        setattr(owner, name, clocked(getattr(owner, name), part, spans, started))
    spans.append((IMPORTS, 0.0, time.time() - started))
    dpo_train.main(arguments, standalone_mode=False)
    return {"spans": spans, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def clocked(function: Callable[..., Any], part: str, spans: list[Span], started: float) -> Callable[..., Any]:
    """The same function, which notes when it ran."""

    @wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        begun = time.time() - started
        try:
            return function(*arguments, **named)
        finally:
            spans.append((part, begun, time.time() - started))

    return noted


def run(cache: Path, output: Path, *arguments: object) -> dict[str, Any]:
    """:func:`timed_run` in a process of its own."""
    command = ["--cache", cache, "--output", output, "--global-batch-size", PAIRS_OF_UPDATE, *arguments]
    done = subprocess.run(
        [sys.executable, __file__, "--pairs", "-", "--folder", "-", "--run", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- waiting for pairs ---------------------------------------------------------------------------------------------


def waiting_section(options: argparse.Namespace, scratch: Path) -> str:
    model = write_random_llama(scratch / "llama", options.pairs)
    # Some rows of real data make no pair.
    dataset = f"{options.pairs},amount={round(options.updates * PAIRS_OF_UPDATE * 1.05)}"
    build = ("build", "--model", str(model), "--dataset", dataset, "--cache", str(scratch / "cache"))
    subprocess.run([sys.executable, "-m", "dpo_cache", *build], check=True, stderr=subprocess.DEVNULL)
    rows = []
    for title, budget in (("the longest pair", ()), ("one pair", ("--tokens-per-microbatch", 1))):
        updates, waits = [], []
        for number in range(options.repeats):
            output = scratch / f"{title} {number}"
            spans = run(scratch / "cache", output, "--max-steps", options.updates, *budget)["spans"]
            timed = [span for span in spans if span[0] == UPDATE][1:]
            updates.append(statistics.fmean(end - start for _, start, end in timed))
            waits.append(sum(seconds_within(spans, READ, update) for update in timed) / len(timed))
        update_s, wait_s = statistics.median(updates), statistics.median(waits)
        rows.append(
            [
                title,
                f"{update_s:.3f} s",
                f"{1e3 * wait_s:.2f} ms",
                f"{wait_s / update_s:.2%}",
                f"{1e3 * wait_s / PAIRS_OF_UPDATE:.2f} ms",
            ]
        )
    return dated_section(
        f"Waiting for pairs, {Path(options.pairs).name}",
        f"A Llama of {NUM_PARAMETERS / 1e6:.0f}M parameters, float32, {options.updates} updates of {PAIRS_OF_UPDATE} "
        f"pairs, the first one untimed; {options.threads} threads; medians of {options.repeats} runs.",
        markdown_table(
            ("a micro-batch holds", "time per update", "of it waiting for pairs", "share", "waiting, per pair"), rows
        ),
        f"{machine('torch')}. {REPEAT}",
    )


def seconds_within(spans: list[Span], part: str, outer: Span) -> float:
    """Seconds of a part inside a span."""
    return sum(end - start for name, start, end in spans if name == part and outer[1] <= start and end <= outer[2])


# ---- before the first update ---------------------------------------------------------------------------------------


def start_section(options: argparse.Namespace, scratch: Path) -> str:
    write_tiny_model(scratch / "model", tokenizer=tiny_tokenizer(vocabulary=512))
    caches = [cache_of(options.folder, num_pairs) for num_pairs in options.sizes]
    # The values are made up, so the policy is not what they were scored with.
    given = ("--model", scratch / "model", "--allow-other-policy", "--max-steps", 2)
    runs: list[list[dict[str, Any]]] = [[] for _ in caches]
    for number in range(options.repeats):
        for cache, runs_of_cache in zip(caches, runs, strict=True):
            runs_of_cache.append(run(cache, scratch / f"{cache.parent.name} {number}", *given))
    columns = [
        {name: statistics.median(parts_of(one)[name] for one in runs_of_cache) for name in parts_of(runs_of_cache[0])}
        for runs_of_cache in runs
    ]
    rows = [[name, *(f"{column[name]:.2f} s" for column in columns)] for name in columns[0]]
    peaks = [statistics.median(one["peak_mib"] for one in runs_of_cache) for runs_of_cache in runs]
    rows.append(["peak memory of the process", *(f"{peak:,.0f} MiB" for peak in peaks)])
    return dated_section(
        f"Before the first update, up to {max(options.sizes):,} pairs",
        f"Whole processes of `dpo-train` with a very small model; {options.threads} threads; medians of "
        f"{options.repeats} interleaved runs. The files are in the page cache.",
        markdown_table(("", *(f"{num_pairs:,} pairs" for num_pairs in options.sizes)), rows),
        f"{machine('torch', 'deepspeed')}. {REPEAT}",
    )


def cache_of(folder: Path, num_pairs: int) -> Path:
    """The cache of so many short pairs, built if it is not there."""
    place = work_folder(folder, num_pairs)
    if not (place / synthetic_cache.CACHE / "mixtures" / "train.json").exists():
        measure(place, ["build"])
    return place / synthetic_cache.CACHE


def parts_of(one_run: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part up to the beginning of the first update, and what they come to."""
    spans: list[Span] = one_run["spans"]
    first_update = next(span for span in spans if span[0] == UPDATE)
    parts = {
        part: seconds_within(spans, part, ("", 0.0, first_update[1]))
        for part in (IMPORTS, JOIN, CACHE, LENGTHS, LOAD, PROOF)
    }
    return {
        **parts,
        "everything else": first_update[1] - sum(parts.values()),
        "from start to first update": first_update[1],
        "the same, beyond loading the model": first_update[1] - parts[LOAD],
        "the first update": first_update[2] - first_update[1],
    }


if __name__ == "__main__":
    main()

"""What one GPU reaches in scoring and in training, with and without each of the things that make it quick.

    python benchmarks/gpu.py                    # an 8B Llama shape scored, the same with LoRA and a 3B one trained
    python benchmarks/gpu.py --what score-8b    # one of them
    python benchmarks/gpu.py --trl-python TRL_ENV/bin/python     # and TRL beside them

Random weights of the real shapes and pairs of realistic lengths: what the numbers are does not change how long they
take. Everything runs as a build or a run would run it, through ``PairScorer`` and DeepSpeed's engine, without the
files around. Rates are medians over repetitions after a warm-up; the rate of plain matrix products is measured first,
in the same run. MFU follows ``pipeline/scoring/flops.py``: useful operations only, a prompt once, causal attention
half, no padding and nothing that is computed again. TRL scores and trains the same pairs in a process of its own, which
needs peft beside it. A section for each of the models is kept in ``benchmarks/results/gpu.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import benchmark_parser
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.batching import plan_batches
from dpo_cache.pipeline.scoring.device_limits import peak_flops_per_second, peak_memory_bytes
from dpo_cache.pipeline.scoring.flops import ModelCost, forward_flops
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import ScoringBatch
from dpo_cache.pipeline.training.activation_checkpointing import recompute_activations
from dpo_cache.pipeline.training.deepspeed_config import EngineSettings, deepspeed_config
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.objective import resolve_objective
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.stages.processes.devices import device_of_rank
from dpo_cache.stages.processes.process_group import process_group
from dpo_cache.stages.processes.ranks import Ranks
from gpu_ways import Subject, Way, ways_of
from gpu_workload import SHAPES, random_model, scored, synthetic_pairs
from result_table import dated_section, keep_section, machine, markdown_table

STARTED = time.perf_counter()
LORA_RANK = 64
TITLES = ("what", "pairs/s", "tokens/s", "TFLOP/s", "share of the products' rate", "MFU", "peak memory, GB")


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit loses no row
    device = device_of_rank(0)
    rate = matmul_rate(device, size=options.matmul_size)
    say(f"products of {options.matmul_size:,} square matrices: {rate / 1e12:.0f} TFLOP/s")
    pairs = synthetic_pairs(max(options.score_pairs, options.train_pairs), longest=options.max_seq_length)
    with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)):
        for what in options.what:
            subject = Subject.parse(what)
            measured_pairs = pairs[: options.train_pairs if subject.trains else options.score_pairs]
            rows: list[tuple[str, ...]] = []
            try:
                for row in measured_rows(subject, options, measured_pairs, device, rate):
                    rows.append(row)
                    say(" | ".join(row))
            finally:
                if rows:
                    found = section(subject, options, measured_pairs, device, rate, rows)
                    if options.keep:
                        keep_section("gpu", found)
                    else:
                        print(found, flush=True)


def say(line: str) -> None:
    """With the seconds since the start: on a machine that is paid by the minute, that tells what to leave out."""
    print(f"{time.perf_counter() - STARTED:5.0f} s: {line}", file=sys.stderr, flush=True)


def measured_rows(
    subject: Subject, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device, rate: float
) -> Iterator[tuple[str, ...]]:
    """Of the table: ours, then TRL's."""
    for way in ways_of(subject, options):
        yield measured(way, options, pairs, device, rate)
    if options.trl_python:
        free_memory(device)
        yield from trl_rows(subject, options, pairs)


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    subjects = [f"{what}-{shape}" for shape in SHAPES for what in ("score", "train", "train-lora")]
    parser.add_argument("--what", nargs="+", default=["score-8b", "train-lora-8b", "train-3b"], choices=subjects)
    parser.add_argument("--score-pairs", type=int, default=192, help="pairs that are scored")
    parser.add_argument("--train-pairs", type=int, default=64, help="pairs of an update")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--tokens-per-batch", type=int, default=32_768, help="of a forward pass in scoring")
    parser.add_argument("--tokens-per-microbatch", type=int, default=12_288, help="of a micro-batch in training")
    parser.add_argument("--matmul-size", type=int, default=8192)
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--trl-python", help="an interpreter with TRL and peft; without, TRL is left out")
    parser.add_argument("--trl-batch-sizes", type=int, nargs="+", default=[4, 16], help="in pairs")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="in results/gpu.md")
    options = parser.parse_args()
    if options.trl_python and any(options.train_pairs % batch_size for batch_size in options.trl_batch_sizes):
        parser.error("--train-pairs has to be a multiple of each of --trl-batch-sizes: an update is all of them")
    return options


# ---- what is measured --------------------------------------------------------------------------------------------


def measured(
    way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device, rate: float
) -> tuple[str, ...]:
    """A row of the table; a way that does not fit into memory says so."""
    free_memory(device)
    try:
        reading = (train if way.subject.trains else score)(way, options, pairs, device)
    except torch.OutOfMemoryError:
        return (way.name, *["out of memory", *[""] * (len(TITLES) - 2)])
    seconds = reading.seconds
    flops_per_second = reading.flops / seconds
    peak = reading.peak_flops
    return (
        way.name,
        f"{reading.pairs / seconds:.1f}",
        f"{reading.tokens / seconds:,.0f}",
        f"{flops_per_second / 1e12:.1f}",
        f"{flops_per_second / rate:.0%}",
        f"{flops_per_second / peak:.0%}" if peak else "",
        f"{reading.memory_bytes / 1e9:.1f}",
    )


@dataclass(kw_only=True)
class Reading:
    """What a measurement came to; ``seconds`` is the median of its repetitions."""

    pairs: int
    tokens: int
    flops: float
    seconds: float
    memory_bytes: int
    peak_flops: float | None = field(default=None)


# ---- scoring -----------------------------------------------------------------------------------------------------


def score(way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device) -> Reading:
    """All pairs, batch by batch."""
    model = random_model(way.subject.shape, way.attention, device)
    scorer = PairScorer(model, head_chunk_tokens=way.head_chunk_tokens).eval()
    cost = ModelCost.of_model(model)
    plans = plan_batches(pairs, way.layout, tokens_per_batch=options.tokens_per_batch)
    batches = [scoring_batch([pairs[member] for member in members], way.layout).to(device) for members in plans]

    def forward() -> None:
        for batch in batches:
            with torch.inference_mode():
                scorer(batch).chosen_logps_B.cpu()

    forward()  # kernels are compiled
    seconds = statistics.median(timed(forward, device) for _ in range(options.repeats))
    return Reading(
        pairs=len(pairs),
        tokens=sum(batch.num_tokens for batch in batches),
        flops=sum(flops_of(cost, batch) for batch in batches),
        seconds=seconds,
        memory_bytes=peak_memory_bytes(device),
        peak_flops=peak_flops_per_second(device),
    )


# ---- training ----------------------------------------------------------------------------------------------------


def train(way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device) -> Reading:
    """Updates on all pairs."""
    model: Any = random_model(way.subject.shape, way.attention, device)
    if way.liger:
        use_liger_layers(model)
    if way.subject.lora:
        model = add_lora(model, LoraSettings(rank=LORA_RANK, alpha=16.0, target_modules=("all-linear",), seed=0))
    if way.recomputes:
        recompute_activations(model)
    engine = PolicyEngine(
        PairScorer(model, head_chunk_tokens=way.head_chunk_tokens),
        config=deepspeed_config(
            EngineSettings(
                zero_stage=way.zero_stage,
                dtype="bfloat16",
                max_grad_norm=1.0,
                num_ranks=1,
                hidden_size=SHAPES[way.subject.shape]["hidden_size"],
                on_gpu=device.type == "cuda",
            )
        ),
        objective=resolve_objective("dpo_norm"),
        weight_decay=0.0,
        bad_batch_path=Path(tempfile.gettempdir()) / "bad_batch.json",
    )
    try:
        return updates(engine, way, options, pairs, device)
    finally:
        engine.deepspeed.destroy()  # also where memory ran out: its hooks would hold all weights beside the next way's


def updates(
    engine: PolicyEngine, way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device
) -> Reading:
    cost = ModelCost.of_model(engine.scorer.model)
    rows = [scored(pair) for pair in pairs]
    plans = plan_batches(pairs, way.layout, tokens_per_batch=options.tokens_per_microbatch)
    micro_batches = [collate([rows[member] for member in members], way.layout).to(device) for members in plans]

    def update() -> None:
        for number, micro_batch in enumerate(micro_batches, start=1):
            engine.micro_step(micro_batch, num_pairs=len(pairs), is_last=number == len(micro_batches))
        engine.apply_update(1e-7)

    update()  # kernels are compiled
    seconds = statistics.median(timed(update, device) for _ in range(options.repeats))
    return Reading(
        pairs=len(pairs),
        tokens=sum(micro_batch.batch.num_tokens for micro_batch in micro_batches),
        flops=sum((1 + cost.backward_forwards) * flops_of(cost, micro_batch.batch) for micro_batch in micro_batches),
        seconds=seconds,
        memory_bytes=peak_memory_bytes(device),
        peak_flops=peak_flops_per_second(device),
    )


# ---- TRL ---------------------------------------------------------------------------------------------------------


def trl_rows(subject: Subject, options: argparse.Namespace, pairs: Sequence[TokenPair]) -> Iterator[tuple[str, ...]]:
    """Its rows of the table, a batch size each. In full it trains without float32 master weights: no comparison."""
    if subject.trains and not subject.lora:
        return
    rows = [scored(pair) for pair in pairs]
    for batch_size in options.trl_batch_sizes:
        job = {
            "what": "train" if subject.trains else "score",
            "shape": SHAPES[subject.shape],
            "lora_rank": LORA_RANK,
            "pairs": [
                (
                    *(ids.tolist() for ids in (row.pair.prompt_ids, row.pair.chosen_ids, row.pair.rejected_ids)),
                    *(row.ref_chosen_logps, row.ref_rejected_logps),
                )
                for row in rows
            ],
            "batch_size": batch_size,
            "accumulation": len(pairs) // batch_size,
            "repeats": options.repeats,
        }
        done = subprocess.run(
            [options.trl_python, Path(__file__).with_name("gpu_trl.py")],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        )
        name = f"TRL, {batch_size} pairs a {'micro-batch' if subject.trains else 'batch'}, sdpa"
        if done.returncode:
            found = "out of memory" if "OutOfMemoryError" in done.stderr else "failed"
            print(done.stderr[-2000:], file=sys.stderr)
            yield (name, found, *[""] * (len(TITLES) - 2))
            continue
        answer = json.loads(done.stdout.splitlines()[-1])  # libraries print before
        rate = len(pairs) / statistics.median(answer["seconds"])
        name = name.replace("TRL", f"TRL {answer['version']}")
        yield (name, f"{rate:.1f}", *[""] * (len(TITLES) - 3), f"{answer['memory_bytes'] / 1e9:.1f}")


# ---- what they share ---------------------------------------------------------------------------------------------


def flops_of(cost: ModelCost, batch: ScoringBatch) -> int:
    return forward_flops(
        cost, num_tokens=batch.num_tokens, num_attended=batch.num_attended, num_scored=batch.num_scored
    )


def matmul_rate(device: torch.device, *, size: int) -> float:
    """Operations a second of a bfloat16 product of square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(10))


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    gc.collect()  # an engine refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def section(
    subject: Subject,
    options: argparse.Namespace,
    pairs: Sequence[TokenPair],
    device: torch.device,
    rate: float,
    rows: Sequence[tuple[str, ...]],
) -> str:
    """A Markdown section."""
    lengths = np.array([pair.shared_prefix_tokens for pair in pairs])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if subject.trains:
        how = (
            f"Updates of {len(pairs)} pairs, {options.tokens_per_microbatch:,} tokens per micro-batch, all activations "
            f"kept, ZeRO stage {options.zero_stage}, unless said otherwise"
        )
    else:
        how = f"{len(pairs)} pairs, {options.tokens_per_batch:,} tokens per batch"
    return dated_section(
        f"{name}, bfloat16, {subject}",
        f"{how}; a pair has {lengths.mean():.0f} tokens on average (at most {lengths.max():,}), its prompt counted "
        f"once. Medians of {options.repeats}. Products of {options.matmul_size:,} × {options.matmul_size:,} matrices: "
        f"{rate / 1e12:.0f} TFLOP/s.",
        markdown_table(TITLES, rows),
        f"{machine('torch', 'transformers', 'deepspeed', 'liger-kernel')}. Repeat with `python benchmarks/gpu.py`.",
    )


if __name__ == "__main__":
    main()

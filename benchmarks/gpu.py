"""What one GPU reaches in scoring and in training, with and without each of the things that make it quick.

    python benchmarks/gpu.py                        # an 8B Llama shape scored, the same with LoRA and a 3B one trained
    python benchmarks/gpu.py --score 8b --train     # scoring alone

Random weights of the real shapes and pairs of realistic lengths: what the numbers are does not change how long they
take. Everything runs as a build or a run would run it, through ``PairScorer`` and DeepSpeed's engine, without the
files around. Rates are medians over batches after a warm-up; the rate of plain matrix products is measured first, in
the same run. MFU follows ``pipeline/scoring/flops.py``: useful operations only, a prompt once, causal attention half,
no padding and nothing that is computed again. A section is kept in ``benchmarks/results/gpu.md``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import benchmark_parser
from dpo_cache.pipeline.cache.example_key import example_key
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.batching import plan_batches
from dpo_cache.pipeline.scoring.device_limits import peak_flops_per_second, peak_memory_bytes
from dpo_cache.pipeline.scoring.flops import ModelCost, forward_flops
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout, ScoringBatch
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
from result_table import dated_section, keep_section, machine, markdown_table
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    },
    "3b": {
        **{"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    },
    "tiny": {
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    },
}
TITLES = ("what", "pairs/s", "tokens/s", "TFLOP/s", "of the products' rate", "MFU", "peak memory, GB")


def main() -> None:
    options = parse_options()
    device = device_of_rank(0)
    rate = matmul_rate(device, size=options.matmul_size)
    pairs = synthetic_pairs(options.pairs, longest=options.max_seq_length)
    rows: list[tuple[str, ...]] = []
    with process_group(Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1)):
        for way in [*scoring_ways(options), *training_ways(options)]:
            rows.append(measured(way, options, pairs, device, rate))
            print(" | ".join(rows[-1]), flush=True)
    found = section(options, pairs, device, rate, rows)
    if options.keep:
        keep_section("gpu", found)
    else:
        print(found)


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--score", nargs="*", default=["8b"], choices=SHAPES, help="shapes to score")
    parser.add_argument("--train", nargs="*", default=["8b-lora", "3b"], help="shapes to train, with -lora or in full")
    parser.add_argument("--pairs", type=int, default=192, help="pairs of a measurement")
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--tokens-per-batch", type=int, default=32_768, help="of a forward pass in scoring")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192, help="of a micro-batch in training")
    parser.add_argument("--matmul-size", type=int, default=8192)
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="in results/gpu.md")
    return parser.parse_args()


# ---- what is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to score or to train.

    Attributes:
        name: In the table.
        shape: A key of :data:`SHAPES`.
        trains: Whether there is a backward pass and an update.
        layout: How pairs lie in rows.
        attention: The kernel.
        head_chunk_tokens: Scored tokens whose logits are held at once; None as usual.
        liger: With Liger's layers.
        lora: An adapter is trained, not the model.
    """

    name: str
    shape: str
    trains: bool = False
    layout: Layout = Layout.PACKED
    attention: str = "flex_attention"
    head_chunk_tokens: int | None = None
    liger: bool = False
    lora: bool = False


def scoring_ways(options: argparse.Namespace) -> Iterator[Way]:
    for shape in options.score:
        for layout, attention in layouts_here():
            yield Way(name=f"score {shape}: {layout}, {attention}", shape=shape, layout=layout, attention=attention)


def layouts_here() -> list[tuple[Layout, str]]:
    ways = [(Layout.PREFIX_SHARED, "sdpa"), (Layout.PADDED, "sdpa")]
    return [(Layout.PACKED, "flex_attention"), *ways] if torch.cuda.is_available() else ways


def training_ways(options: argparse.Namespace) -> Iterator[Way]:
    """All of it first, then all but one thing at a time."""
    layout, attention = layouts_here()[0]
    for named in options.train:
        shape = named.removesuffix("-lora")
        whole = Way(
            name=f"train {named}: {layout}, {attention}" + (", Liger" if torch.cuda.is_available() else ""),
            shape=shape,
            trains=True,
            layout=layout,
            attention=attention,
            liger=torch.cuda.is_available(),
            lora=named.endswith("-lora"),
        )
        yield whole
        if layout is Layout.PACKED:
            yield replace(
                whole, name="… without packing: prefix-shared, sdpa", layout=Layout.PREFIX_SHARED, attention="sdpa"
            )
        yield replace(whole, name="… without a shared prefix: padded, sdpa", layout=Layout.PADDED, attention="sdpa")
        yield replace(whole, name="… with all logits at once", head_chunk_tokens=10**9)
        if whole.liger:
            yield replace(whole, name="… without Liger", liger=False)


def measured(
    way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device, rate: float
) -> tuple[str, ...]:
    """A row of the table; a way that does not fit into memory says so."""
    free_memory(device)
    try:
        reading = (train if way.trains else score)(way, options, pairs, device)
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
    """What a measurement added up to; ``seconds`` are the medians of its batches, summed."""

    pairs: int
    tokens: int
    flops: float
    seconds: float
    memory_bytes: int
    peak_flops: float | None = field(default=None)


# ---- scoring -----------------------------------------------------------------------------------------------------


def score(way: Way, options: argparse.Namespace, pairs: Sequence[TokenPair], device: torch.device) -> Reading:
    """All pairs, batch by batch, each three times."""
    model = random_model(way, device)
    scorer = PairScorer(model, head_chunk_tokens=way.head_chunk_tokens).eval()
    cost = ModelCost.of_model(model)
    plans = plan_batches(pairs, way.layout, tokens_per_batch=options.tokens_per_batch)
    batches = [scoring_batch([pairs[member] for member in members], way.layout).to(device) for members in plans]

    def forward(batch: ScoringBatch) -> None:
        with torch.inference_mode():
            scorer(batch).chosen_logps_B.cpu()

    for batch in batches[:2]:
        forward(batch)  # kernels are compiled
    seconds = sum(
        statistics.median(timed(lambda batch=batch: forward(batch), device) for _ in range(3))  # type: ignore[misc]
        for batch in batches
    )
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
    """Updates on all pairs, three after one that warms up."""
    model: Any = random_model(way, device)
    if way.liger:
        use_liger_layers(model)
    if way.lora:
        model = add_lora(model, LoraSettings(rank=64, alpha=16.0, target_modules=("all-linear",), seed=0))
    recompute_activations(model)
    engine = PolicyEngine(
        PairScorer(model, head_chunk_tokens=way.head_chunk_tokens),
        config=deepspeed_config(
            EngineSettings(
                zero_stage=options.zero_stage,
                dtype="bfloat16",
                max_grad_norm=1.0,
                num_ranks=1,
                hidden_size=SHAPES[way.shape]["hidden_size"],
                on_gpu=device.type == "cuda",
            )
        ),
        objective=resolve_objective("dpo_norm"),
        weight_decay=0.0,
        bad_batch_path=Path(tempfile.gettempdir()) / "bad_batch.json",
    )
    cost = ModelCost.of_model(engine.scorer.model)
    rows = [scored(pair) for pair in pairs]
    plans = plan_batches(pairs, way.layout, tokens_per_batch=options.tokens_per_microbatch)
    micro_batches = [collate([rows[member] for member in members], way.layout).to(device) for members in plans]

    def update() -> None:
        for number, micro_batch in enumerate(micro_batches, start=1):
            engine.micro_step(micro_batch, num_pairs=len(pairs), is_last=number == len(micro_batches))
        engine.apply_update(1e-7)

    update()
    seconds = statistics.median(timed(update, device) for _ in range(3))
    reading = Reading(
        pairs=len(pairs),
        tokens=sum(micro_batch.batch.num_tokens for micro_batch in micro_batches),
        flops=sum((1 + cost.backward_forwards) * flops_of(cost, micro_batch.batch) for micro_batch in micro_batches),
        seconds=seconds,
        memory_bytes=peak_memory_bytes(device),
        peak_flops=peak_flops_per_second(device),
    )
    engine.deepspeed.destroy()
    return reading


# ---- what they share ---------------------------------------------------------------------------------------------


def random_model(way: Way, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[way.shape], max_position_embeddings=8192, rope_theta=500_000.0, use_cache=False)
    config._attn_implementation = way.attention
    with torch.device(device), default_dtype(torch.bfloat16):
        return LlamaForCausalLM(config).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def synthetic_pairs(count: int, *, longest: int) -> list[TokenPair]:
    """Lengths as preference data for chat has them: a prompt of some 200 tokens, answers of some 350, long tails."""
    random = np.random.RandomState(0)
    vocabulary = min(shape["vocab_size"] for shape in SHAPES.values())

    def ids(tokens: int) -> Any:
        return random.randint(0, vocabulary, max(1, tokens)).astype(np.int32)

    pairs = []
    for _ in range(count):
        prompt = min(int(random.lognormal(5.3, 1.0)), longest // 2)
        answers = [min(int(random.lognormal(5.85, 0.7)), longest - prompt) for _ in range(2)]
        pairs.append(TokenPair(prompt_ids=ids(prompt), chosen_ids=ids(answers[0]), rejected_ids=ids(answers[1])))
    return pairs


def scored(pair: TokenPair) -> ScoredPair:
    chosen, rejected = -11.0 * pair.chosen_tokens, -11.0 * pair.rejected_tokens
    return ScoredPair(
        key=example_key(pair),
        pair=pair,
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
        ref_chosen_common_logps=chosen,
        ref_rejected_common_logps=rejected,
        chosen_tokens=pair.chosen_tokens,
        rejected_tokens=pair.rejected_tokens,
    )


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
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def section(
    options: argparse.Namespace,
    pairs: Sequence[TokenPair],
    device: torch.device,
    rate: float,
    rows: Sequence[tuple[str, ...]],
) -> str:
    """A Markdown section."""
    lengths = np.array([pair.shared_prefix_tokens for pair in pairs])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return dated_section(
        f"{name}, bfloat16",
        f"{len(pairs)} pairs of {lengths.mean():.0f} tokens on average, prompt once (at most {lengths.max():,}); "
        f"{options.tokens_per_batch:,} tokens a batch in scoring, {options.tokens_per_microbatch:,} a micro-batch in "
        f"training, all layers recomputed, ZeRO stage {options.zero_stage}, one update of all pairs. Products of "
        f"{options.matmul_size:,} square matrices: {rate / 1e12:.0f} TFLOP/s.",
        markdown_table(TITLES, rows),
        f"{machine('torch', 'transformers', 'deepspeed', 'liger-kernel')}. Repeat with `python benchmarks/gpu.py`.",
    )


if __name__ == "__main__":
    main()

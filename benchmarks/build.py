"""How fast stage one scores, against TRL's ``precompute_ref_log_probs`` and against the machine itself.

    python -m venv TRL_ENV && TRL_ENV/bin/pip install trl==1.16.0 torch
    python benchmarks/build.py --trl-python TRL_ENV/bin/python --pairs hh_harmless.jsonl.gz --dtype float32

Both score the same token ids with the same weights, dtype and number of threads, taking turns in one run; TRL at
each of several batch sizes. Only the scoring pass is timed, collating included: no imports, no tokenising, no files.
Medians count. A table is appended to ``benchmarks/results/build.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import add_pairs, add_threads, add_trl, benchmark_parser
from dpo_cache.pipeline.data.dataset_source import open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.pipeline.data.tokenized_rows import tokenize_rows
from dpo_cache.pipeline.data.unusable_row import UnusableRow
from dpo_cache.pipeline.scoring.batching import CPU_FILL_TOKENS, plan_batches
from dpo_cache.pipeline.scoring.flops import ModelCost, forward_flops
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.model_loading import load_causal_lm
from dpo_cache.pipeline.scoring.onednn_linear import linear
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.prompt_group import group_by_prompt
from result_table import LOAD_BEFORE, dated_section, keep_section, markdown_table, threads_of_machine
from small_llama import write_random_llama

TRL_BATCH_SIZES = (1, 2, 4, 8)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="dpo-cache-benchmark-") as folder:
        model_folder = write_random_llama(Path(folder), options.pairs)
        pairs = tokenized_pairs(model_folder, options.pairs, options.num_pairs)
        ours = OurScoring(model_folder, options.dtype, pairs)
        with TrlScoring(options.trl_python, model_folder, options.dtype, pairs, options.threads) as trl:
            measured = measure(ours, trl, repeats=options.repeats, dtype=getattr(torch, options.dtype))
    table = measured.table(options, num_pairs=len(pairs))
    keep_section("build", table)


def parse_options() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add_trl(parser)
    add_pairs(parser)
    parser.add_argument("--num-pairs", type=int, default=128, help="about how many of them")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    add_threads(parser)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


# ---- what is scored --------------------------------------------------------------------------------------------


def tokenized_pairs(model_folder: Path, pairs_file: str, count: int) -> list[TokenPair]:
    """About ``count`` usable pairs: whole prompt groups from the start of the data, as a unit of a build has them."""
    settings = TokenizationSettings(
        tokenizer=str(model_folder), chat_template=None, max_seq_length=2048, truncation="drop", mask="last-turn"
    )
    chunks = tokenize_rows(open_dataset(DatasetSpec.parse(pairs_file)), settings, num_processes=1, chunk_rows=512)
    usable = [pair for chunk in chunks for pair in chunk.results if not isinstance(pair, UnusableRow)]
    chosen: list[TokenPair] = []
    for group in group_by_prompt(usable):
        if len(chosen) >= count:
            break
        chosen += [usable[index] for index in group.pairs]
    return chosen


# ---- the two sides ---------------------------------------------------------------------------------------------


class OurScoring:
    """What a scoring process of stage one does with a unit."""

    def __init__(self, model_folder: Path, dtype: str, pairs: Sequence[TokenPair]) -> None:
        model = load_causal_lm(model_folder, dtype=getattr(torch, dtype), attention="sdpa", device="cpu")
        self._cost = ModelCost.of_model(model)
        self._scorer = PairScorer(model).eval()
        self._layout = choose_layout(self._scorer, device="cpu", pairs=pairs[:1])
        self._pairs = pairs

    @torch.inference_mode()
    def score(self) -> tuple[float, list[tuple[float, float]]]:
        """Seconds, and (chosen, rejected) of each pair."""
        values: dict[int, tuple[float, float]] = {}
        started = time.perf_counter()
        for members in plan_batches(self._pairs, self._layout, tokens_per_batch=8192, fill_tokens=CPU_FILL_TOKENS):
            logps = self._scorer(scoring_batch([self._pairs[member] for member in members], self._layout))
            both = zip(logps.chosen_logps_B.tolist(), logps.rejected_logps_B.tolist(), strict=True)
            values.update(zip(members, both, strict=True))
        return time.perf_counter() - started, [values[number] for number in range(len(self._pairs))]

    def flops(self) -> int:
        """Useful operations of one pass: no padding, each prompt and each distinct response once."""
        batch = scoring_batch(self._pairs, self._layout)
        return forward_flops(
            self._cost, num_tokens=batch.num_tokens, num_attended=batch.num_attended, num_scored=batch.num_scored
        )


class TrlScoring:
    """TRL in its own process, waiting for a batch size to run; idle while we measure ourselves."""

    def __init__(self, python: str, model_folder: Path, dtype: str, pairs: Sequence[TokenPair], threads: int) -> None:
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("build_trl.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A warm OpenMP thread that spins would take the core from the other side.
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"},
        )
        job = {
            "model": str(model_folder),
            "dtype": dtype,
            "threads": threads,
            "pairs": [
                [ids.tolist() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)] for pair in pairs
            ],
        }
        self._say(json.dumps(job))
        assert self._answer() == "ready"

    def score(self, batch_size: int) -> tuple[float, list[tuple[float, float]]]:
        """Seconds, and (chosen, rejected) of each pair."""
        self._say(str(batch_size))
        answer = json.loads(self._answer())
        return answer["seconds"], answer["values"]

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            sys.exit("the TRL process ended; what it said is above")
        return line

    def __enter__(self) -> TrlScoring:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()


# ---- measuring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of one run.

    Attributes:
        ours_s: Our scoring pass.
        trl_s: TRL's, by batch size.
        max_relative_difference: Between our values and TRL's, largest over pairs and sides.
        flops: Useful operations of one pass of ours.
        matmul_flops: Operations a second of a large matrix product in the same dtype.
    """

    ours_s: float
    trl_s: dict[int, float]
    max_relative_difference: float
    flops: int
    matmul_flops: float

    def table(self, options: argparse.Namespace, *, num_pairs: int) -> str:
        """A Markdown section."""
        best = min(self.trl_s, key=self.trl_s.__getitem__)
        rate = self.flops / self.ours_s
        rows = [("ours", f"{self.ours_s:.2f}", f"{num_pairs / self.ours_s:.1f}", "")]
        for size, seconds in self.trl_s.items():
            name = f"TRL, batches of {size}{' (its best)' if size == best else ''}"
            times = f"{seconds / self.ours_s:.2f} times as fast"
            rows.append((name, f"{seconds:.2f}", f"{num_pairs / seconds:.1f}", times))
        return dated_section(
            f"{Path(options.pairs).name}, {options.dtype}",
            f"{num_pairs} pairs, a Llama of 34M parameters, {threads_of_machine(options.threads)}; medians of "
            f"{options.repeats} interleaved passes; load average before the run: {LOAD_BEFORE:.1f}.",
            markdown_table(("scoring pass", "seconds", "pairs/s", "ours is"), rows),
            f"Useful operations: {rate / 1e9:.0f} GFLOP/s, {rate / self.matmul_flops:.0%} of the "
            f"{self.matmul_flops / 1e9:.0f} GFLOP/s of a product of 2048 × 2048 matrices. Largest relative difference "
            f"between values: {self.max_relative_difference:.1e}.",
        )


def measure(ours: OurScoring, trl: TrlScoring, *, repeats: int, dtype: torch.dtype) -> Measured:
    """Every contender once a round, so that what else the machine does meets all alike."""
    ours.score()
    ours_s: list[float] = []
    trl_s: dict[int, list[float]] = {size: [] for size in TRL_BATCH_SIZES}
    rates: list[float] = []
    for _ in range(repeats):
        rates.append(matmul_flops(dtype))
        seconds, our_values = ours.score()
        ours_s.append(seconds)
        for size in TRL_BATCH_SIZES:
            seconds, trl_values = trl.score(size)
            trl_s[size].append(seconds)
    return Measured(
        ours_s=statistics.median(ours_s),
        trl_s={size: statistics.median(seconds) for size, seconds in trl_s.items()},
        max_relative_difference=max(
            abs(one - other) / abs(other)
            for our_pair, trl_pair in zip(our_values, trl_values, strict=True)
            for one, other in zip(our_pair, trl_pair, strict=True)
        ),
        flops=ours.flops(),
        matmul_flops=statistics.median(rates),
    )


def matmul_flops(dtype: torch.dtype, size: int = 2048, products: int = 8) -> float:
    """What the machine does in a large matrix product, operations a second: PyTorch's own or oneDNN's, the quicker."""
    one, other = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return products * 2 * size**3 / min(_seconds(product, one, other, products) for product in (torch.mm, linear))


def _seconds(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], one: torch.Tensor, other: torch.Tensor, times: int
) -> float:
    product(one, other)
    started = time.perf_counter()
    for _ in range(times):
        product(one, other)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

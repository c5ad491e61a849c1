"""How full the planners make batches, and how evenly they load the ranks, on real lengths; no model runs.

    python benchmarks/packing.py --pairs hh_harmless.jsonl.gz alpaca_eval_pairs.jsonl.gz

Fill is the tokens in a batch over its budget. A global batch is a number of pairs, so its tokens rarely come to a
whole number of micro-batches on every rank: "possible" is what no dealing could surpass. Balance is the mean load of
the ranks over the largest, micro-step by micro-step, as ZeRO-3 makes them wait; one long pair can set the largest.
Unused budget costs no time, for micro-batches hold no padding; imbalance does. A section a file is kept in
``benchmarks/results/packing.md``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from command_line import benchmark_parser
from dpo_cache.pipeline.data.dataset_source import open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.pipeline.data.tokenized_rows import tokenize_rows
from dpo_cache.pipeline.data.unusable_row import UnusableRow
from dpo_cache.pipeline.scoring.batching import plan_batches
from dpo_cache.pipeline.scoring.prompt_group import group_by_prompt
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.dealing import deal
from result_table import dated_section, keep_section, machine, markdown_table
from small_llama import VOCABULARY, write_tokenizer

BUDGETS = (4096, 8192, 16_384)
RANKS = (1, 2, 8, 32)
GLOBAL_BATCHES = (128, 1024)
TRAINING_TITLES = (
    *("training: pairs per update", "ranks", "tokens per micro-batch", "micro-steps"),
    *("fill", "possible", "balance", "possible"),
)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--pairs", required=True, nargs="+", type=Path, help="files of preference pairs")
    for file in parser.parse_args().pairs:
        keep_section("packing", section(file, tokenized_pairs(file)))


def tokenized_pairs(file: Path) -> list[TokenPair]:
    with tempfile.TemporaryDirectory(prefix="dpo-cache-benchmark-") as folder:
        write_tokenizer(Path(folder), str(file))
        settings = TokenizationSettings(tokenizer=folder, max_seq_length=4096)
        chunks = tokenize_rows(open_dataset(DatasetSpec.parse(str(file))), settings, num_processes=1, chunk_rows=512)
        return [pair for chunk in chunks for pair in chunk.results if not isinstance(pair, UnusableRow)]


def section(file: Path, pairs: Sequence[TokenPair]) -> str:
    """A Markdown section: scoring, then training."""
    lengths = np.array([pair.shared_prefix_tokens for pair in pairs])
    shortest, median, longest = np.percentile(lengths, [5, 50, 95])
    return dated_section(
        file.name,
        f"{len(pairs):,} pairs of {lengths.mean():.0f} tokens on average, the prompt counted once "
        f"(median {median:.0f}, 90% from {shortest:.0f} to {longest:.0f}, at most {lengths.max():,}); "
        f"a vocabulary of {VOCABULARY:,}.",
        markdown_table(
            ("scoring: tokens per batch", "batches", "fill", "fill without the last batch"),
            [scoring_row(pairs, budget) for budget in BUDGETS],
        ),
        markdown_table(
            TRAINING_TITLES,
            list(training_rows(lengths)),
            num_texts=0,
        ),
        f"{machine('numpy')}. Repeat with `python benchmarks/packing.py --pairs …`.",
    )


def scoring_row(pairs: Sequence[TokenPair], budget: int) -> list[str]:
    """All pairs as one unit of work; a prompt group computes its prompt and each distinct answer once."""
    batches = plan_batches(pairs, Layout.PACKED, tokens_per_batch=budget)
    tokens = sorted(
        sum(group.num_tokens for group in group_by_prompt([pairs[member] for member in batch])) for batch in batches
    )
    without_last = sum(tokens[1:]) / (budget * max(1, len(batches) - 1))
    return [f"{budget:,}", f"{len(batches):,}", f"{sum(tokens) / (budget * len(batches)):.1%}", f"{without_last:.1%}"]


def training_rows(lengths: npt.NDArray[np.int64]) -> Iterator[list[str]]:
    order = np.random.RandomState(0).permutation(len(lengths))
    for global_batch_size in GLOBAL_BATCHES:
        whole = len(order) // global_batch_size * global_batch_size
        batches = [order[start : start + global_batch_size] for start in range(0, whole, global_batch_size)]
        for num_ranks in RANKS:
            for budget in BUDGETS:
                yield training_row(lengths, batches, num_ranks, budget)


def training_row(
    lengths: npt.NDArray[np.int64], batches: Sequence[npt.NDArray[np.int64]], num_ranks: int, budget: int
) -> list[str]:
    tokens = micro_steps = fewest = waited = least_wait = 0
    for rows in batches:
        dealt = deal(rows, lengths[rows], num_ranks=num_ranks, tokens_per_microbatch=budget)
        loads = np.array([[int(lengths[micro_batch].sum()) for micro_batch in rank] for rank in dealt])
        tokens += int(loads.sum())
        micro_steps += loads.shape[1]
        fewest += math.ceil(loads.sum() / (num_ranks * budget))
        waited += num_ranks * int(loads.max(axis=0).sum())
        least_wait += max(int(loads.sum()), num_ranks * int(lengths[rows].max()))
    return [
        f"{len(batches[0]):,}",
        f"{num_ranks}",
        f"{budget:,}",
        f"{micro_steps / len(batches):.1f}",
        f"{tokens / (micro_steps * num_ranks * budget):.1%}",
        f"{tokens / (fewest * num_ranks * budget):.1%}",
        f"{tokens / waited:.1%}",
        f"{tokens / least_wait:.1%}",
    ]


if __name__ == "__main__":
    main()

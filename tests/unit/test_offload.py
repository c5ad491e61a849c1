"""Where state lies, in host memory or twice, changes nothing about what is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed_run import run_ranks
from training_factory import make_engine, random_pairs, train_steps

BATCHES = [random_pairs(5, seed=step) for step in range(3)]
CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (2, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True}),
    (3, {"offload_optimizer": True, "offload_parameters": True}),
    (3, {"hierarchical_partition_size": 2}),
]


def train_everywhere(folder: str, cases: list[tuple[int, dict[str, Any]]]) -> list[Any]:
    engines = (make_engine(Path(folder), zero_stage=stage, num_ranks=2, **options) for stage, options in cases)
    return [train_steps(engine, BATCHES, learning_rate=2e-3, micro_steps=2) for engine in engines]


def test_offloaded_and_doubly_partitioned_state_trains_the_same(tmp_path: Path) -> None:
    for of_rank in run_ranks(train_everywhere, str(tmp_path), CASES, num_ranks=2):
        expected = of_rank[0]
        for (stage, options), figures in zip(CASES, of_rank, strict=True):
            for found, wanted in zip(figures, expected, strict=True):
                assert found == pytest.approx(wanted, rel=2e-5), (stage, options)

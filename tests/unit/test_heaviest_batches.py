"""What a dry run measures: the batch of most tokens and that of the longest pair, which may be another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from cache_factory import fill_cache, make_cache, make_pair, make_row
from dpo_cache.pipeline.cache.example_key import key_at
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.global_batches import GlobalBatchPlan
from dpo_cache.pipeline.training.micro_batch import MicroBatch
from dpo_cache.pipeline.training.objective import resolve_objective
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.stages.training import training_loop
from dpo_cache.stages.training.recipe import Recipe
from dpo_cache.stages.training.training_loop import MicroBatches, TrainingLoop
from training_factory import tiny_policy

PROMPT_TOKENS = [200, 1, 150, 150, 5, 5, 10, 3]
"""Of each pair, in training order, two pairs a batch: the longest is in the first batch, most tokens in the second."""


class TimedEngine:
    """Does nothing, in a time of its own: a batch takes longer the first time, and the second batch than others."""

    rank, num_ranks, device = 0, 1, torch.device("cpu")
    scorer = SimpleNamespace(model=tiny_policy())

    def __init__(self, first_row: dict[bytes, int]) -> None:
        self.now = 0.0
        self.tried: list[int] = []
        self._first_row = first_row
        self._rows: list[int] = []

    def micro_step(self, micro_batch: MicroBatch, *, num_pairs: int, is_last: bool) -> None:
        assert num_pairs == 2
        self._rows += [self._first_row[key] for key in micro_batch.keys]

    def apply_update(self, learning_rate: float) -> float:
        assert learning_rate == 0
        (batch,) = {row // 2 for row in self._rows}
        assert len(self._rows) == 2
        self._rows = []
        self.now += 100 if batch not in self.tried else 3 if batch == 1 else 2
        self.tried.append(batch)
        return 0.0


def test_the_batch_of_most_tokens_and_that_of_the_longest_pair_are_timed_once_they_are_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.RandomState(0)
    rows = [
        make_row(make_pair(random, prompt=[place, *range(1, tokens)]), random)
        for place, tokens in enumerate(PROMPT_TOKENS)
    ]
    cache = make_cache(tmp_path / "cache")
    mixture = fill_cache(cache, rows, shard_rows=4)
    keys = [key_at(mixture.rows().example_keys, place) for place in range(len(rows))]
    order = np.array([keys.index(row.key) for row in rows])
    plan = GlobalBatchPlan(num_pairs=len(rows), global_batch_size=2, epoch_order=lambda _: order)
    monkeypatch.setattr(training_loop, "global_batches", lambda *_: plan)

    engine: Any = TimedEngine({row.key: place for place, row in enumerate(rows)})
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    micro_batches = MicroBatches(
        cache, mixture, layout=Layout.PREFIX_SHARED, engine=cast(PolicyEngine, engine), tokens_per_microbatch=250
    )
    recipe: Any = SimpleNamespace(objective=resolve_objective("dpo"), global_batch_size=2, seed=0)
    loop = TrainingLoop(engine, cast(Recipe, recipe), micro_batches, None)
    assert loop.time_heaviest_batches() == 3
    assert sorted(engine.tried) == [0, 0, 1, 1]

"""How the pairs of global batches come to the device: complete, in order, and before an update asks for them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.stages.training.training_loop import MicroBatches
from torch import device

BATCHES = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 10)]


def micro_batches(folder: Path, *, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
    """Ten pairs, about one in a micro-batch."""
    cache = make_cache(folder / f"cache-{rank}-{num_ranks}")
    mixture = fill_cache(cache, make_rows(10), shard_rows=4)
    engine = SimpleNamespace(rank=rank, num_ranks=num_ranks, device=device("cpu"))
    return MicroBatches(
        cache, mixture, layout=Layout.PADDED, engine=cast(PolicyEngine, engine), tokens_per_microbatch=1
    )


def test_every_pair_of_every_global_batch_comes_once_and_the_last_one_of_a_batch_is_marked(tmp_path: Path) -> None:
    rows: list[list[int]] = [[], [], []]
    for rank in range(2):
        with micro_batches(tmp_path, rank=rank, num_ranks=2).read(BATCHES) as dealt:
            batch = 0
            for one in dealt:
                assert one.num_pairs == len(BATCHES[batch])
                assert one.micro_batch.num_pairs == len(one.rows)
                rows[batch] += one.rows.tolist()
                batch += one.is_last
        assert batch == len(BATCHES)
    assert [sorted(of_batch) for of_batch in rows] == [batch.tolist() for batch in BATCHES]


def test_the_first_pairs_of_the_next_update_are_read_during_the_last_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out = 0

    def counted(*arguments: Any) -> Any:
        nonlocal laid_out
        laid_out += 1
        return collate(*arguments)

    monkeypatch.setattr("dpo_cache.stages.training.training_loop.collate", counted)
    with micro_batches(tmp_path).read(BATCHES) as dealt:
        used = 0
        for one in dealt:
            used += 1
            if one.is_last:
                break
        deadline = time.monotonic() + 30
        while laid_out <= used and time.monotonic() < deadline:
            time.sleep(0.01)
        assert laid_out > used

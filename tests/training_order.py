"""The rows of each global batch of a run, worked out beside the trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from commands import shard_rows
from dpo_cache.pipeline.cache.pair_order import epoch_order


def pairs_in_training_order(
    cache: Path, num_steps: int, *, global_batch_size: int, seed: int = 42
) -> list[list[dict[str, Any]]]:
    """The rows of each global batch, joined by key with pyarrow alone."""
    pointer = json.loads((cache / "mixtures/train.json").read_text())
    table = pq.read_table(cache / "mixtures" / f"{pointer['table']['sha256']}.parquet")
    rows = {row["example_key"]: row for row in shard_rows(cache).to_pylist()}
    in_mixture = [rows[key] for key in table.column("example_key").to_pylist()]
    per_epoch = math.ceil(len(in_mixture) / global_batch_size)
    batches = []
    for step in range(num_steps):
        order = epoch_order(
            num_pairs=len(in_mixture),
            block_rows=pointer["block_rows"],
            seed=seed,
            epoch=step // per_epoch,
            mixture_digest=pointer["digest"],
        )
        start = step % per_epoch * global_batch_size
        batches.append([in_mixture[place] for place in order[start : start + global_batch_size]])
    return batches

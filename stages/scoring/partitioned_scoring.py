"""A reference larger than one GPU: its weights partitioned over all ranks by DeepSpeed ZeRO-3.

Every forward pass gathers each weight from all ranks, so all of them run the same number of passes: a rank without
a batch runs an empty one until nobody has any left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from transformers.integrations import HfDeepSpeedConfig

from ..building.build_plan import ScoringPlan
from ..processes.job_store import StoreAddress
from ..processes.process_group import TIMEOUT, deepspeed_device, prepare_deepspeed
from ..processes.ranks import ranks_from_environment
from .planned_reference import load_planned_reference

Batch = TypeVar("Batch")


class PartitionedScoring:
    """The reference, spread over the ranks of the job.

    Args:
        plan: With which model.
        address: The build's store, through which the ranks find each other.
        device: This rank's.
    """

    def __init__(self, plan: ScoringPlan, address: StoreAddress, device: torch.device) -> None:
        ranks = ranks_from_environment()
        assert ranks is not None, "whoever starts a partitioned worker says which rank it is"
        self._device = device
        os.environ |= deepspeed_device(ranks, device)  # for good: this process does nothing else
        store = address.connect()
        store.set_timeout(TIMEOUT)  # ranks may be minutes apart: some still copy the model
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("ranks", store),
            rank=ranks.rank,
            world_size=ranks.num_ranks,
            timeout=TIMEOUT,
        )
        prepare_deepspeed()
        deepspeed.init_distributed()
        config = _zero3_config(plan.dtype)
        partitioning = HfDeepSpeedConfig(config)  # while it lives, weights are partitioned as they are read
        scorer = load_planned_reference(plan, device)
        del partitioning
        self.engine: Any = deepspeed.initialize(model=scorer, config=config)[0]
        self.engine.eval()

    def in_step(self, batches: Iterable[Batch]) -> Iterator[Batch | None]:
        """This rank's batches, and None for each pass that only the others need."""
        own = iter(batches)
        while True:
            batch = next(own, None)
            ranks_with_work = torch.tensor([batch is not None], dtype=torch.int32, device=self._device)
            dist.all_reduce(ranks_with_work)
            if not ranks_with_work.item():
                return
            yield batch


@contextmanager
def partitioned_scoring(plan: ScoringPlan, address: StoreAddress, device: torch.device) -> Iterator[PartitionedScoring]:
    """The same, for as long as it is used; then the ranks part: threads of gloo would abort a process that ends."""
    scoring = PartitionedScoring(plan, address, device)
    try:
        yield scoring
    except BaseException:
        # NCCL would wait for ranks that wait for this one: it is left as it is, and ends with the process.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _zero3_config(dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {"stage": 3},
    }

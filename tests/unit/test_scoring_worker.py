"""A scoring process against a store in this process: memory that runs out, faults of the writer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import logps_by_key
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.pipeline.cache.pair_spool import PairSpoolWriter
from dpo_cache.pipeline.cache.reference_identity import identify_reference
from dpo_cache.pipeline.cache.shard_folder import ShardFolder
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import ScoringBatch
from dpo_cache.stages.building.build_plan import ScoringPlan, Unit
from dpo_cache.stages.processes.job_store import JobStore
from dpo_cache.stages.scoring import scoring_worker
from dpo_cache.stages.scoring.planned_reference import load_planned_reference
from dpo_cache.stages.scoring.scoring_worker import ScoringWorker
from dpo_cache.stages.scoring.unit_queue import UnitQueue
from scoring_plans import EMPTY_PLAN
from tiny_model import write_tiny_model
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def pairs(count: int) -> list[TokenPair]:
    random = np.random.RandomState(0)

    def ids(shortest: int, longest: int) -> Any:
        return random.randint(5, 200, random.randint(shortest, longest)).astype(np.int32)

    return [TokenPair(prompt_ids=ids(3, 20), chosen_ids=ids(2, 20), rejected_ids=ids(2, 20)) for _ in range(count)]


def plan_in(folder: Path, model_folder: Path, token_pairs: list[TokenPair], *, tokens_per_batch: int) -> ScoringPlan:
    """A cache and a plan of two units."""
    identity = identify_reference(
        model_folder,
        adapter_folder=None,
        weight_dtype="float32",
        compute_dtype="float32",
        attention="sdpa",
        scoring_version=1,
    )
    cache = ReferenceCache.create(folder, CacheDescription(identity=identity, recorded={}, vocabulary_sha256="0" * 64))
    spool = cache.path / "tmp" / "pairs.arrow"
    with PairSpoolWriter(spool) as writer:
        for pair in token_pairs:
            writer.append(pair)
    order = cache.path / "tmp" / "order.npy"
    np.save(order, np.arange(len(token_pairs)))
    half = len(token_pairs) // 2
    return replace(
        EMPTY_PLAN,
        cache=str(folder),
        model_folder=str(model_folder),
        tokens_per_batch=tokens_per_batch,
        spool=str(spool),
        order=str(order),
        longest=0,
        units=[Unit(start=0, stop=half), Unit(start=half, stop=len(token_pairs))],
    )


@dataclass
class Device:
    """The memory of the device that references are loaded onto, counted in the tokens of a forward pass.

    Attributes:
        fits: Tokens of the largest pass that it holds.
        refused: The sizes of the passes that ran out of it.
    """

    fits: float = math.inf
    refused: list[int] = field(default_factory=list)

    def load(self, plan: ScoringPlan, device: torch.device) -> PairScorer:
        """Load a plan's reference."""
        scorer = load_planned_reference(plan, device)
        scorer.register_forward_pre_hook(self._make_room)
        return scorer

    def _make_room(self, _scorer: nn.Module, arguments: tuple[ScoringBatch]) -> None:
        if (num_tokens := arguments[0].input_ids_RT.numel()) > self.fits:
            self.refused.append(num_tokens)
            raise torch.OutOfMemoryError


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """What workers score on; it holds everything until a test makes it smaller."""
    device = Device()
    monkeypatch.setattr(scoring_worker, "load_planned_reference", device.load)
    return device


def scored_values(plan: ScoringPlan) -> tuple[dict[bytes, tuple[float, float]], int]:
    """Key to values of all shards, and the forward passes it took."""
    job = JobStore(None)
    ScoringWorker(plan, job.address, CPU).run()
    queue = UnitQueue(job.store, len(plan.units))
    assert queue.num_finished == len(plan.units)
    assert queue.add("pairs", 0) == plan.num_pairs
    return logps_by_key(Path(plan.cache)), queue.add("forwards", 0)


def recorded_of(shard: Path) -> dict[str, Any]:
    """What a shard's footer says of how its rows were scored."""
    recorded: dict[str, Any] = json.loads(pq.read_metadata(shard).metadata[b"dpo_cache.recorded"])
    return recorded


def test_a_shard_records_the_device_the_layout_and_the_token_budget_of_its_batches(
    model_folder: Path, tmp_path: Path
) -> None:
    scored_values(plan_in(tmp_path / "cache", model_folder, pairs(4), tokens_per_batch=512))
    recorded = [recorded_of(shard) for shard in (tmp_path / "cache" / "shards").iterdir()]
    assert recorded == 2 * [{"device": "cpu", "layout": "prefix-shared", "tokens_per_batch": 512}]


def test_a_longest_pair_that_does_not_fit_shows_before_a_unit_is_drawn(
    device: Device, model_folder: Path, tmp_path: Path
) -> None:
    prompt, chosen, rejected = np.arange(100, 400, dtype=np.int32).reshape(3, 100) % 200
    longest = TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
    plan = plan_in(tmp_path / "cache", model_folder, [*pairs(4), longest], tokens_per_batch=8192)
    device.fits = 299
    job = JobStore(None)
    ScoringWorker(plan, job.address, CPU)  # tries another pair than the longest
    with pytest.raises(torch.OutOfMemoryError):
        ScoringWorker(replace(plan, longest=4), job.address, CPU)
    assert job.store.add("units/drawn", 0) == 0


def test_a_batch_that_does_not_fit_is_scored_in_parts_and_the_budget_stays_halved(
    device: Device, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_worker, "CPU_FILL_TOKENS", None)
    token_pairs = pairs(40)
    whole, _ = scored_values(plan_in(tmp_path / "whole", model_folder, token_pairs, tokens_per_batch=8192))
    device.fits = 200
    parts, forwards = scored_values(plan_in(tmp_path / "parts", model_folder, token_pairs, tokens_per_batch=8192))
    assert parts.keys() == whole.keys()
    for key, values in whole.items():
        assert parts[key] == pytest.approx(values, rel=1e-5)
    assert len(device.refused) >= 2
    assert forwards > 5
    recorded = [recorded_of(shard) for shard in (tmp_path / "parts" / "shards").iterdir()]
    assert max(shard["tokens_per_batch"] for shard in recorded) <= device.fits
    # Once the budget has shrunk, what is laid out anew fits: only batches that were waiting already failed.
    assert len(device.refused) < 12


def test_a_long_pair_and_a_short_one_that_do_not_fit_together_are_scored_apart(
    device: Device, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a row of its own they fill two long rows: half of what was computed is more than they have tokens."""
    monkeypatch.setattr(scoring_worker, "CPU_FILL_TOKENS", None)
    long, short = (
        TokenPair(prompt_ids=ids[:-2], chosen_ids=ids[-2:-1], rejected_ids=ids[-1:])
        for ids in (np.arange(length, dtype=np.int32) % 200 for length in (3000, 5))
    )
    plan = plan_in(tmp_path / "cache", model_folder, 2 * [long, short], tokens_per_batch=8192)
    job = JobStore(None)
    worker = ScoringWorker(plan, job.address, CPU)
    device.fits = 3100
    worker.run()
    queue = UnitQueue(job.store, len(plan.units))
    assert (queue.num_finished, queue.add("forwards", 0)) == (2, 4)
    assert set(device.refused) == {2 * 3008}


def test_a_single_pair_that_does_not_fit_is_a_fault_that_says_so(
    device: Device, model_folder: Path, tmp_path: Path
) -> None:
    plan = plan_in(tmp_path / "cache", model_folder, pairs(4), tokens_per_batch=8192)
    job = JobStore(None)
    worker = ScoringWorker(plan, job.address, CPU)
    device.fits = 0
    with pytest.raises(DpoCacheError, match=r"a single pair of \d+ tokens does not fit"):
        worker.run()


def test_a_shard_that_cannot_be_written_stops_the_worker_and_finishes_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_in(tmp_path / "cache", model_folder, pairs(4), tokens_per_batch=8192)
    job = JobStore(None)
    worker = ScoringWorker(plan, job.address, CPU)

    def full(*_: Any, **__: Any) -> Any:
        raise DpoCacheError("the disk is full")

    monkeypatch.setattr(ShardFolder, "write", full)
    with pytest.raises(DpoCacheError, match="the disk is full"):
        worker.run()
    assert UnitQueue(job.store, 2).num_finished == 0

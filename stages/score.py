"""One scoring process: draw units, score them, write each as a shard."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch.distributed import DistError, Store

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.example_key import example_key
from ..pipeline.cache.pair_spool import PairSpool
from ..pipeline.cache.shard_file import ScoredPair
from ..pipeline.data.token_pair import TokenPair
from ..pipeline.scoring.batching import plan_batches
from ..pipeline.scoring.layout_choice import choose_layout
from ..pipeline.scoring.layouts import Layout, build_batch
from ..pipeline.scoring.model_loading import load_causal_lm
from ..pipeline.scoring.pair_scorer import PairScorer
from .build_plan import ScoringPlan, Unit
from .unit_queue import Heartbeat, UnitQueue, connect_to_store


class Stopped(Exception):
    """This process was asked to stop; the unit in hand is dropped."""


def score_units(plan_path: Path, host: str, port: int, rank_of_node: int) -> None:
    """Score units until the build has none left.

    Args:
        plan_path: The plan that the coordinator wrote.
        host: Where the build's store is.
        port: Its port.
        rank_of_node: Which GPU of this machine is ours.

    Raises:
        DpoCacheError: The model cannot be loaded, memory runs out, or the store is lost.
    """
    plan = ScoringPlan.read(plan_path)
    store = connect_to_store(host, port)
    queue = UnitQueue(store, len(plan.units))
    signal.signal(signal.SIGTERM, _stop)
    try:
        with Heartbeat(store.clone()):
            worker = UnitScorer(plan, queue, rank_of_node)
            worker.try_longest()
            for unit in queue.units():
                worker.score(plan.units[unit])
                queue.finish(unit)
    except Stopped:
        return
    except DistError as lost:
        raise DpoCacheError(
            "the store that hands out the work of this build is gone",
            next_step="run the same command again: what is finished stays",
        ) from lost


class UnitScorer:
    """The reference on one device, and where its results go."""

    def __init__(self, plan: ScoringPlan, queue: UnitQueue, rank_of_node: int) -> None:
        self._plan = plan
        self._queue = queue
        self._cache = ReferenceCache.open(Path(plan.cache))
        self._spool = PairSpool(Path(plan.spool))
        self._device = _device_of(rank_of_node)
        model = load_causal_lm(
            plan.model_folder,
            dtype=getattr(torch, plan.dtype),
            attention=plan.attention,
            device=self._device,
            trust_remote_code=plan.trust_remote_code,
        )
        self._scorer = PairScorer(model).eval()
        self._layout: Layout = choose_layout(model)

    def try_longest(self) -> None:
        """Score the plan's longest pair and forget it: running out of memory should show in the first minute."""
        self._forward(self._spool.read([self._plan.longest]))

    def score(self, unit: Unit) -> None:
        """Score one unit and write its shard; pairs without a finite value are reported instead."""
        pairs = self._spool.read(self._plan.order[unit.start : unit.stop])
        scored: list[ScoredPair] = []
        for batch in plan_batches(pairs, tokens_per_batch=self._plan.tokens_per_batch):
            chosen_pairs = [pairs[index] for index in batch]
            scored += self._forward(chosen_pairs)
            self._queue.add("forwards", 1)
            self._queue.add("pairs", len(chosen_pairs))
            self._queue.add("tokens", sum(pair.shared_prefix_tokens for pair in chosen_pairs))
        usable = [row for row in scored if row.is_valid]
        self._queue.report_nonfinite([row.key for row in scored if not row.is_valid])
        if usable:
            self._cache.write_shard(usable)

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[TokenPair]) -> list[ScoredPair]:
        logps = self._scorer(build_batch(pairs, self._layout).to(self._device))
        sums = torch.stack(
            [
                logps.chosen_logps_B,
                logps.rejected_logps_B,
                logps.chosen_common_logps_B,
                logps.rejected_common_logps_B,
            ]
        )
        return [
            ScoredPair(
                key=example_key(pair),
                pair=pair,
                ref_chosen_logps=float(chosen),
                ref_rejected_logps=float(rejected),
                ref_chosen_common_logps=float(chosen_common),
                ref_rejected_common_logps=float(rejected_common),
                chosen_tokens=pair.chosen_tokens,
                rejected_tokens=pair.rejected_tokens,
            )
            for pair, (chosen, rejected, chosen_common, rejected_common) in zip(
                pairs, np.asarray(sums.T.cpu(), dtype=np.float64), strict=True
            )
        ]


def _device_of(rank_of_node: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank_of_node)
    torch.cuda.set_device(device)
    return device


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise Stopped

"""One scoring process: draw units, score them, write each as a shard."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch.distributed import DistError

from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.example_key import example_key
from ..pipeline.cache.pair_spool import PairSpool
from ..pipeline.cache.shard_file import VALUE_COLUMNS, ScoredPair, unusable_values
from ..pipeline.data.token_pair import TokenPair
from ..pipeline.scoring.batching import CPU_FILL_TOKENS, plan_batches
from ..pipeline.scoring.layout_choice import choose_layout
from ..pipeline.scoring.layouts import scoring_batch
from ..pipeline.scoring.model_loading import load_causal_lm
from ..pipeline.scoring.pair_scorer import PairScorer
from .build_plan import ScoringPlan, Unit
from .job_store import StoreAddress, store_lost
from .progress import quiet_libraries
from .unit_queue import Heartbeat, UnitQueue


def score_units(plan_path: Path, address: StoreAddress, rank_of_node: int) -> None:
    """Score units until the build has none left.

    Args:
        plan_path: The plan that the leading process wrote.
        address: Where the build's store is.
        rank_of_node: Which GPU of this machine is ours.

    Raises:
        DpoCacheError: The model cannot be used, or the store is lost.
    """
    signal.signal(signal.SIGTERM, _stop)
    quiet_libraries()
    plan = ScoringPlan.read(plan_path)
    try:
        queue = UnitQueue(address.connect(), len(plan.units))
        with Heartbeat(address.connect()):
            scorer = UnitScorer(plan, queue, rank_of_node)
            for unit in queue.units():
                scorer.score(plan.units[unit])
                queue.finish(unit)
    except KeyboardInterrupt:
        return  # asked to stop: the unit in hand is dropped
    except DistError as lost:
        raise store_lost() from lost


class UnitScorer:
    """The reference on one device, and where its results go.

    Args:
        plan: What is to be scored, with which model.
        queue: Told how far we are.
        rank_of_node: Which GPU of this machine is ours.
    """

    def __init__(self, plan: ScoringPlan, queue: UnitQueue, rank_of_node: int) -> None:
        self._plan = plan
        self._queue = queue
        self._cache = ReferenceCache.open(Path(plan.cache))
        self._spool = PairSpool(Path(plan.spool))
        self._device = _device_of(rank_of_node)
        self._fill_tokens = CPU_FILL_TOKENS if self._device.type == "cpu" else None
        model = load_causal_lm(
            plan.model_folder,
            dtype=getattr(torch, plan.dtype),
            attention=plan.attention,
            device=self._device,
            trust_remote_code=plan.trust_remote_code,
        )
        self._scorer = PairScorer(model).eval()
        # The longest pair goes first, with the proof of the layout: too little memory shows in the first minute.
        self._layout = choose_layout(self._scorer, device=self._device, pairs=self._spool.read([plan.longest]))

    def score(self, unit: Unit) -> None:
        """Score one unit and write its shard; pairs without finite values are reported instead."""
        pairs = self._spool.read(self._plan.order[unit.start : unit.stop])
        rows: dict[int, ScoredPair] = {}
        batches = plan_batches(
            pairs, self._layout, tokens_per_batch=self._plan.tokens_per_batch, fill_tokens=self._fill_tokens
        )
        for members in batches:
            batch_pairs = [pairs[member] for member in members]
            rows.update(zip(members, self._forward(batch_pairs), strict=True))
            self._queue.add("forwards", 1)
            self._queue.add("pairs", len(members))
            self._queue.add("tokens", sum(pair.shared_prefix_tokens for pair in batch_pairs))
        self._keep([rows[place] for place in range(len(pairs))])

    def _keep(self, rows: Sequence[ScoredPair]) -> None:
        unusable = unusable_values({name: np.array([getattr(row, name) for row in rows]) for name in VALUE_COLUMNS})
        self._queue.report_nonfinite([row.key for row, is_unusable in zip(rows, unusable, strict=True) if is_unusable])
        usable = [row for row, is_unusable in zip(rows, unusable, strict=True) if not is_unusable]
        if usable:
            self._cache.write_shard(usable, recorded={"layout": str(self._layout), "device": self._device.type})

    @torch.inference_mode()
    def _forward(self, pairs: Sequence[TokenPair]) -> list[ScoredPair]:
        logps = self._scorer(scoring_batch(pairs, self._layout).to(self._device))
        columns = (
            logps.chosen_logps_B,
            logps.rejected_logps_B,
            logps.chosen_common_logps_B,
            logps.rejected_common_logps_B,
        )
        return [
            ScoredPair(
                key=example_key(pair),
                pair=pair,
                ref_chosen_logps=chosen,
                ref_rejected_logps=rejected,
                ref_chosen_common_logps=chosen_common,
                ref_rejected_common_logps=rejected_common,
                chosen_tokens=pair.chosen_tokens,
                rejected_tokens=pair.rejected_tokens,
            )
            for pair, (chosen, rejected, chosen_common, rejected_common) in zip(
                pairs, torch.stack(columns, dim=1).tolist(), strict=True
            )
        ]


def _device_of(rank_of_node: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank_of_node)
    torch.cuda.set_device(device)
    return device


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

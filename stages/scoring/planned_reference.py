"""The reference that a plan names, loaded to score."""

from __future__ import annotations

import torch

from ...pipeline.scoring.pair_scorer import PairScorer
from ...pipeline.scoring.reference_scorer import load_scorer
from ..building.build_plan import ScoringPlan


def load_planned_reference(plan: ScoringPlan, device: torch.device) -> PairScorer:
    """Load it on one device; partitioned over all ranks where a ZeRO-3 configuration of transformers is alive."""
    return load_scorer(
        plan.model_folder,
        dtype=plan.dtype,
        attention=plan.attention,
        device=device,
        adapter=plan.adapter_folder,
        quantization=plan.quantization,
        trust_remote_code=plan.trust_remote_code,
    )

"""The plan of a scoring job, as small as it can be."""

from __future__ import annotations

from dpo_cache.stages.building.build_plan import ScoringPlan

EMPTY_PLAN = ScoringPlan(
    cache="cache",
    model_folder="model",
    adapter_folder=None,
    quantization=None,
    dtype="float32",
    attention="sdpa",
    trust_remote_code=False,
    zero_stage=0,
    tokens_per_batch=None,
    token_logps=False,
    spool="spool",
    order="order.npy",
    longest=None,
    units=[],
)

"""The settings of ``dpo-cache import``: those of a build that decide about tokens and identity, and a few more."""

from __future__ import annotations

from dataclasses import dataclass

from .build_config import BuildConfig
from .setting import setting

NOT_IMPORTED = ("drop_nonfinite", "token_logps", "num_workers", "tokens_per_batch", "zero_stage", "dry_run")
"""Settings of a build that only scoring has a use for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(BuildConfig):
    """Which reference gave the values, for which pairs, into which cache."""

    values: str = setting(
        "sums",
        help="What the source holds for each answer: sums over its tokens, or averages per token (open-instruct's "
        "cache for dpo_norm).",
        choices=("sums", "averages"),
    )
    rescore: int = setting(
        16, help="Score this many of the pairs with the reference and refuse values that differ; 0: none.", minimum=0
    )

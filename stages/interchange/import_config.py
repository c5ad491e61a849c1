"""The settings of ``dpo-cache import``: those of a build that decide about tokens and identity, and a few more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..building.build_config import BuildConfig
from ..setting import setting

NOT_IMPORTED = ("drop_nonfinite", "token_logps", "num_workers", "tokens_per_batch", "zero_stage", "dry_run")
"""Settings of a build that only scoring uses."""

for_import = partial(setting, group="Imported values")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig(BuildConfig):
    """Which reference the values are from, for which pairs, into which cache."""

    values: str = for_import(
        "sums",
        help="What the source holds for each response: the sum over its tokens, or the average per token (as "
        "open-instruct's cache for dpo_norm does).",
        choices=("sums", "averages"),
    )
    rescore: int = for_import(
        16, help="Score a sample of N pairs with the reference and refuse values that differ; 0 for none.", minimum=0
    )

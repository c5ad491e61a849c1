"""Options of a build that contradict each other, or would be ignored, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_config import BuildConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": ()}, "no --dataset is given"),
        ({"zero_stage": 1}, "--zero-stage is 1"),
        ({"adapter_revision": "v1"}, "--adapter-revision has no effect without --adapter"),
        ({"replace": True, "extend": True}, "--replace and --extend are given together"),
        ({"quantization": "nf4", "zero_stage": 3}, "which cannot partition quantized weights"),
        ({"quantization": "nf4", "adapter": "a"}, "no policy could start from the two"),
    ],
)
def test_what_would_be_ignored_or_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": "m", "dataset": ("d",), "cache": Path("c"), **options}
    with pytest.raises(DpoCacheError, match=message):
        BuildConfig(**given)

"""Liger's layers without a GPU; ``tests/gpu`` has them with one."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from tiny_model_factory import tiny_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, where Liger's kernels run")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(DpoCacheError, match="--use-liger-kernel needs a GPU: Liger's kernels are written in Triton"):
        use_liger_layers(tiny_model("llama"))

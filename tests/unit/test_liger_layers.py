"""Liger's layers without a GPU; ``tests/gpu`` has them with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from tiny_model_factory import tiny_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, where Liger's kernels run")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(DpoCacheError, match="--use-liger-kernel needs a GPU: Liger's kernels are written in Triton"):
        use_liger_layers(tiny_model("llama"))


def test_their_kernels_give_the_models_own_values_and_gradients() -> None:
    """Interpreted, in shared prefixes, where positions go back; with an adapter and recomputed activations too."""
    pytest.importorskip("triton", reason="without Triton there is nothing to interpret Liger's kernels with")
    script = Path(__file__).parents[1] / "interpreted_liger.py"
    done = subprocess.run(
        [sys.executable, str(script), "llama:adapted", "gemma2"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for case, mlp in zip(cases, ("swiglu", "geglu_tanh"), strict=True):
        passes = [f"_{layer}_{way}_kernel" for layer in (mlp, "rms_norm") for way in ("forward", "backward")]
        assert case["kernels"] == sorted([*passes, "_triton_rope"])
        assert max(case["differences"].values()) < 1e-5

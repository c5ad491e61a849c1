"""Liger's layers: the same values on a GPU, and a reason where they cannot run."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from tiny_model_factory import tiny_model, token_pairs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, where Liger's kernels run")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(DpoCacheError, match="--use-liger-kernel needs a GPU: Liger's kernels are written in Triton"):
        use_liger_layers(tiny_model("llama"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA device")
def test_on_a_gpu_values_and_gradients_are_the_models_own() -> None:
    batch = scoring_batch(token_pairs(), Layout.PREFIX_SHARED).to("cuda")
    results = []
    for liger in (False, True):
        model = tiny_model("llama").to("cuda")
        if liger:
            use_liger_layers(model)
        logps = PairScorer(model)(batch)
        torch.autograd.backward(logps.chosen_logps_B.sum() - logps.rejected_logps_B.sum())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([logps.chosen_logps_B.detach(), logps.rejected_logps_B.detach(), *gradients])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA device")
def test_an_architecture_that_liger_does_not_know_is_named() -> None:
    with pytest.raises(DpoCacheError, match="Liger has no kernels for gpt2 models"):
        use_liger_layers(tiny_model("gpt2"))

"""Layers that recompute their activations: how many, and with which gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.activation_checkpointing import recompute_activations
from tiny_model_factory import tiny_model, token_pairs
from torch import nn


def passes_of_layers(model: Any) -> list[int]:
    """How often each layer runs forward in one forward and backward pass."""
    passes = [0] * len(model.model.layers)

    def count(number: int) -> Any:
        return lambda *_: passes.__setitem__(number, passes[number] + 1)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(count(number))  # recomputing stops before its end
    model.train()
    logps = PairScorer(model)(scoring_batch(token_pairs(), Layout.PREFIX_SHARED))
    torch.autograd.backward(logps.chosen_logps_B.sum() - logps.rejected_logps_B.sum())
    return passes


@pytest.mark.parametrize(
    ("kept_share", "expected"),
    [
        (0.0, [2, 2, 2, 2, 2, 2, 2, 2]),
        (0.25, [2, 2, 2, 1, 2, 2, 2, 1]),
        (0.75, [2, 1, 1, 1, 2, 1, 1, 1]),
        (1.0, [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_share_of_the_layers_keeps_what_it_computed(kept_share: float, expected: list[int]) -> None:
    plain, model = (tiny_model("llama", num_hidden_layers=8) for _ in range(2))
    assert passes_of_layers(plain) == [1] * 8
    recompute_activations(model, kept_share=kept_share)
    assert passes_of_layers(model) == expected
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_model_that_recomputes_everything_or_nothing_has_no_share() -> None:
    class Whole(nn.Module):
        def gradient_checkpointing_enable(self, **_: Any) -> None: ...

    recompute_activations(Whole())
    with pytest.raises(DpoCacheError, match="--activation-memory-budget cannot be kept by this model"):
        recompute_activations(Whole(), kept_share=0.5)

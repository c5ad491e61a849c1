"""Attending segment by segment changes no value and no gradient, only what is visited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpo_cache.pipeline.scoring import tree_attention
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from tiny_model_factory import tiny_model, token_pairs
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The couples (query, key) of each call of the kernel."""
    couples: list[int] = []

    def kernel(module: Any, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        couples.append(query.shape[0] * query.shape[2] * key.shape[2])
        return sdpa_attention_forward(module, query, key, *rest, **options)

    monkeypatch.setattr(tree_attention, "sdpa_attention_forward", kernel)
    return couples


@pytest.mark.parametrize("layout", [Layout.PREFIX_SHARED, Layout.PACKED])
@pytest.mark.parametrize("name", ["llama", "olmo3", "mistral", "gemma3", "qwen2"])
def test_values_and_gradients_are_those_of_the_dense_mask_for_fewer_couples(
    name: str, layout: Layout, visited: list[int]
) -> None:
    scorer = PairScorer(tiny_model(name).double())
    batch = scoring_batch(token_pairs(), layout)

    def logps_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        visited.clear()
        scorer.zero_grad()
        logps = scorer(batch)
        torch.autograd.backward(logps.chosen_logps_B.sum() - logps.rejected_logps_B.sum())
        gradients = [parameter.grad.clone() for parameter in scorer.parameters() if parameter.grad is not None]
        return logps.token_logps_N.detach(), gradients, sum(visited)

    by_segment, gradients, couples = logps_and_gradients()
    try:
        AttentionInterface.register(
            "sdpa",
            lambda module, query, key, value, mask, **options: tree_attention.tree_sdpa_attention(
                module,
                query,
                key,
                value,
                mask.clone(),
                **options,  # a copy carries no segments
            ),
        )
        dense, dense_gradients, dense_couples = logps_and_gradients()
    finally:
        tree_attention.install_tree_attention()
    # Some norms and rotary embeddings are computed in fp32 whatever the weights.
    torch.testing.assert_close(by_segment, dense, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(gradients, dense_gradients, atol=2e-5, rtol=1e-5)
    assert couples < 0.8 * dense_couples

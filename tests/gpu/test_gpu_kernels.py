"""Attention, the vocabulary head and Liger's layers on a GPU, against the plain way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.utils
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.completion_head import install_completion_head
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import empty_batch, packed_batch, scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from tiny_model_factory import tiny_model, token_ids, token_pairs, weighted_loss
from torch import nn

ARCHITECTURES = ("llama", "gemma2", "qwen3-sliding", "mistral", "olmo3")


def gradients(model: Any, layout: Layout) -> dict[str, torch.Tensor]:
    logps = PairScorer(model)(scoring_batch(token_pairs(), layout).to("cuda"))
    torch.autograd.backward(weighted_loss(list(logps.chosen_logps_B), list(logps.rejected_logps_B)))
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max().clamp(min=1e-3)
        assert (ours[name] - gradient).abs().max() / largest < 1e-3, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flex_attention_trains_packed_rows(name: str) -> None:
    flex, eager = (tiny_model(name, attention=kernel, head_dim=16).cuda() for kernel in ("flex_attention", "eager"))
    assert choose_layout(PairScorer(flex), device="cuda") is Layout.PACKED
    assert_alike(gradients(flex, Layout.PACKED), gradients(eager, Layout.PADDED))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma2"])
def test_sdpa_trains_shared_prefixes(name: str) -> None:
    sdpa, eager = (tiny_model(name, attention=kernel, head_dim=16).cuda() for kernel in ("sdpa", "eager"))
    assert choose_layout(PairScorer(sdpa), device="cuda") is Layout.PREFIX_SHARED
    assert_alike(gradients(sdpa, Layout.PREFIX_SHARED), gradients(eager, Layout.PADDED))


def test_flex_attention_stays_fused_whatever_the_length() -> None:
    scorer = PairScorer(
        tiny_model("olmo3", attention="flex_attention", head_dim=16, max_position_embeddings=4096).cuda()
    )
    choose_layout(scorer, device="cuda")
    lengths = (300, 500, 700, 1000, 2000, 3000, 800, 444)
    batches = [_packed(tokens).to("cuda") for tokens in lengths] + [empty_batch(Layout.PACKED).to("cuda")]
    for batch in batches:
        with torch.inference_mode():
            scorer(batch)
        logps = scorer(batch)
        torch.autograd.backward(logps.chosen_logps_B.sum() + logps.rejected_logps_B.sum())
    frames: Any = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"]


def _packed(tokens: int) -> Any:
    import numpy as np

    random = np.random.RandomState(tokens)
    parts = [token_ids(random, share) for share in (tokens // 2, tokens // 4, tokens // 4)]
    return packed_batch([TokenPair(prompt_ids=parts[0], chosen_ids=parts[1], rejected_ids=parts[2])])


def test_the_head_of_a_bfloat16_model_gives_float32_logits() -> None:
    """From bfloat16 logits a log-probability would be off by up to 1e-1."""
    torch.manual_seed(0)
    head = nn.Linear(256, 4096, bias=False).cuda().bfloat16()
    with torch.no_grad():
        head.weight.mul_(20)
    hidden = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 4096, (100,), device="cuda")
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = (exact_hidden @ head.weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    scoring = install_completion_head(head, tiny_model("llama").config, chunk_tokens=32)
    logps = scoring(hidden, targets)
    torch.testing.assert_close(logps, exact.float(), atol=1e-4, rtol=1e-5)
    torch.autograd.backward([logps.sum(), exact.sum()])
    assert hidden.grad is not None
    assert exact_hidden.grad is not None
    largest = exact_hidden.grad.abs().max()
    assert (hidden.grad.double() - exact_hidden.grad).abs().max() / largest < 2e-2


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "olmo2", "gemma2"])
def test_ligers_layers_give_the_models_own_values_and_gradients(name: str) -> None:
    model = tiny_model(name, attention="eager", head_dim=16).cuda()
    # First: Liger puts its rotary embedding into the module, for models made before as well.
    plain = gradients(model, Layout.PREFIX_SHARED)
    model.zero_grad()
    use_liger_layers(model)
    assert_alike(gradients(model, Layout.PREFIX_SHARED), plain)


def test_an_architecture_that_liger_does_not_know_is_named() -> None:
    with pytest.raises(DpoCacheError, match="Liger has no kernels for gpt2 models"):
        use_liger_layers(tiny_model("gpt2"))

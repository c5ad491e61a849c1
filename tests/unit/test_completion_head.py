"""The chunked head against log-softmax of whole logits, values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.completion_head import CompletionHead, install_completion_head
from dpo_cache.pipeline.scoring.shape_rounding import rounded_up
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, VOCABULARY, TOKENS = 8, 50, 23


class Config(SimpleNamespace):
    """A transformers config, as far as the head reads one."""

    model_type = "some"

    def get_text_config(self) -> Config:
        return self


TRANSFORMS = {
    "plain": Config(),
    "softcap": Config(final_logit_softcapping=2.0),
    "multiplied": Config(logit_scale=0.25),
    "divided": Config(logits_scaling=4.0),
    "hyperclovax": Config(logits_scaling=4.0, model_type="hyperclovax"),
    "both": Config(lm_head_multiplier=3.0, final_logit_softcapping=2.0),
}


def plain_logits(name: str, product: torch.Tensor) -> torch.Tensor:
    return {
        "plain": lambda: product,
        "softcap": lambda: 2.0 * torch.tanh(product / 2.0),
        "multiplied": lambda: product * 0.25,
        "divided": lambda: product / 4.0,
        "hyperclovax": lambda: product * 4.0,
        "both": lambda: 2.0 * torch.tanh(3.0 * product / 2.0),
    }[name]()


def head_and_inputs(
    config: Config, *, chunk_tokens: int | None, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[CompletionHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    head = install_completion_head(linear, config, chunk_tokens=chunk_tokens)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_and_gradients_equal_those_of_whole_logits(name: str, bias: bool, chunk_tokens: int | None) -> None:
    head, hidden, targets = head_and_inputs(TRANSFORMS[name], chunk_tokens=chunk_tokens, bias=bias)
    wanted = [hidden, *head.parameters()]
    weights = torch.randn(TOKENS, dtype=torch.float64)

    logits = plain_logits(name, nn.functional.linear(hidden, head.weight, head.bias))
    plain = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
    plain_gradients = torch.autograd.grad((plain * weights).sum(), wanted)
    logps = head(hidden, targets)
    torch.testing.assert_close(logps, plain, atol=1e-12, rtol=0)
    for ours, theirs in zip(torch.autograd.grad((logps * weights).sum(), wanted), plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_nothing_to_score_gives_zero_gradients() -> None:
    """A rank without work still has to answer the others' reductions."""
    head, hidden, targets = head_and_inputs(Config(), chunk_tokens=4)
    head(hidden[:0], targets[:0]).sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_a_frozen_head_passes_its_gradient_on() -> None:
    head, hidden, targets = head_and_inputs(Config(), chunk_tokens=4)
    head.requires_grad_(False)
    head(hidden, targets).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_without_targets_it_is_the_plain_linear_layer() -> None:
    head, hidden, _ = head_and_inputs(TRANSFORMS["both"], chunk_tokens=4)
    assert torch.equal(head(hidden), nn.functional.linear(hidden, head.weight, head.bias))
    assert set(head.state_dict()) == {"weight", "bias"}


def test_values_are_fp32_from_bf16_weights_and_gradients_keep_their_dtype() -> None:
    head, hidden, targets = head_and_inputs(Config(), chunk_tokens=4, dtype=torch.bfloat16)
    logps = head(hidden, targets)
    assert logps.dtype is torch.float32
    logps.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert hidden.grad.dtype is head.weight.grad.dtype is torch.bfloat16


def test_weight_gradients_of_many_chunks_are_summed_in_fp32() -> None:
    """Four thousand equal shares: halves added in bf16 stop at 128."""
    head = install_completion_head(nn.Linear(1, 2, bias=False, dtype=torch.bfloat16), Config(), chunk_tokens=1)
    with torch.no_grad():
        head.weight.zero_()
    head(torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.long)).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad[:, 0].tolist() == [2048.0, -2048.0]


class LoraLinear(nn.Linear):
    """Stands for any layer that computes something else than its weight says."""


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operation for the largest tensor that it makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_logits_of_more_than_one_chunk_never_exist() -> None:
    head, _, _ = head_and_inputs(Config(), chunk_tokens=16)
    hidden = torch.randn(400, HIDDEN, dtype=torch.float64, requires_grad=True)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        head(hidden, torch.zeros(400, dtype=torch.long)).sum().backward()
    assert largest.elements == max(rounded_up(400) * HIDDEN, 16 * VOCABULARY)


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    with pytest.raises(DpoCacheError, match=r"vocabulary head is a .*LoraLinear"):
        install_completion_head(LoraLinear(2, 2), Config())

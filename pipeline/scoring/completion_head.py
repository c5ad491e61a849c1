"""The vocabulary head for completions: hidden states and targets to token logps, a chunk of tokens at a time.

The (tokens, vocabulary) logits are never held whole: a chunk's are made, reduced to one log-sum-exp a token and
dropped, and made again in the backward pass. The chunk loop lies inside one autograd function inside the head's own
module call. Under ZeRO-3 the head's hooks then gather its weight once a forward and once a backward pass, whatever
the number of chunks, and ranks may hold different numbers of scored tokens, none included.

Shapes: N scored tokens, C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...errors import DpoCacheError
from .onednn_linear import linear
from .shape_rounding import rounded_up

CPU_CHUNK_BYTES = 8 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
"""Logits of one chunk in fp32: on a CPU they should stay in its cache, on a GPU they should fill it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTransform:
    """What a model does to the product of hidden state and head before the softmax.

    ``logits = softcap * tanh(scale * product / softcap)``, or ``scale * product`` without a softcap.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of_config(cls, config: Any) -> LogitTransform:
        """Read from the config under the names that transformers' models use.

        Completeness is not assumed: the layout's self-test compares with the model's own logits and refuses a model
        whose head does something else.
        """
        config = config.get_text_config()
        # Cohere and Falcon-H1 multiply; Granite and MiniCPM3 divide by what HyperCLOVA-X multiplies with.
        scale = _number(config, "logit_scale") * _number(config, "lm_head_multiplier")
        scaling = _number(config, "logits_scaling")
        scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
        return cls(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))

    def apply_(self, product_CV: Tensor) -> Tensor:
        """Transform in place."""
        if self.softcap is None:
            return product_CV if self.scale == 1.0 else product_CV.mul_(self.scale)
        return product_CV.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits_CV: Tensor) -> Tensor | float | None:
        """``d logits / d product`` at these logits; None where it is 1."""
        if self.softcap is not None:
            return (logits_CV / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)
        return None if self.scale == 1.0 else self.scale


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else 1.0


class CompletionHead(nn.Linear):
    """A model's own vocabulary head that can also score targets.

    Made from an ``nn.Linear`` by :func:`install_completion_head`, so parameter names, tying and hooks stay as they
    are. Called with hidden states alone it is the plain linear it was.
    """

    transform: LogitTransform
    chunk_tokens: int | None

    def forward(self, hidden: Tensor, targets_N: Tensor | None = None) -> Tensor:
        """Logits without targets; with them ``log p(target)`` in nats, shape (N,), fp32 or wider."""
        if targets_N is None:
            return super().forward(hidden)
        num_scored = len(targets_N)
        padding = rounded_up(num_scored) - num_scored
        logps: Tensor = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
            # Some backbones keep their residual stream in fp32.
            F.pad(hidden.to(self.weight.dtype), (0, 0, 0, padding)),
            self.weight,
            self.bias,
            F.pad(targets_N, (0, padding)),
            self.transform,
            self._chunk_tokens(hidden.device),
        )
        return logps[:num_scored]

    def _chunk_tokens(self, device: torch.device) -> int:
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
        return max(32, chunk_bytes // (4 * self.out_features))


def install_completion_head(head: nn.Module, config: Any, *, chunk_tokens: int | None = None) -> CompletionHead:
    """Give a model's vocabulary head the ability to score targets.

    Args:
        head: The module that ``get_output_embeddings`` returns.
        config: The model's config, read for its logit transform.
        chunk_tokens: Tokens whose logits are held at once; None to follow the size of the vocabulary.

    Raises:
        DpoCacheError: The head is no plain linear layer (an adapter on the head, a quantized head).
    """
    if type(head) not in (nn.Linear, CompletionHead):
        raise DpoCacheError(
            f"the model's vocabulary head is a {type(head).__module__}.{type(head).__qualname__}",
            expected="a torch.nn.Linear",
            next_step="leave the vocabulary head out of adapters and quantization; an adapter that is trained already "
            "can be merged into its base (peft's merge_and_unload)",
        )
    head.__class__ = CompletionHead
    assert isinstance(head, CompletionHead)
    head.transform = LogitTransform.of_config(config)
    head.chunk_tokens = chunk_tokens
    return head


class _ChunkedLogps(torch.autograd.Function):
    """Token logps of a linear head; keeps hidden states and log-sum-exps, makes the logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        logps_N = hidden_NH.new_empty(len(targets_N), dtype=wide)
        lse_N = torch.empty_like(logps_N)
        for chunk in _chunks(len(targets_N), chunk_tokens):
            logits_CV = transform.apply_(_product(hidden_NH[chunk], weight_VH, bias_V, wide))
            picked_C = logits_CV.gather(1, targets_N[chunk, None])[:, 0]
            # log-sum-exp in place: a second chunk of logits would be the largest tensor here.
            largest_C = logits_CV.amax(dim=1)
            sums_C = logits_CV.sub_(largest_C[:, None]).exp_().sum(dim=1)
            lse_N[chunk] = sums_C.log_().add_(largest_C)
            logps_N[chunk] = picked_C - lse_N[chunk]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, lse_N)
        ctx.transform, ctx.chunk_tokens = transform, chunk_tokens
        return logps_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, lse_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        narrow, wide = hidden_NH.dtype, lse_N.dtype
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        # Summed over chunks in fp32: in bf16 the later chunks' small shares would be rounded away.
        grad_weight_VH: Tensor | None = None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if wants_bias else None
        for chunk in _chunks(len(targets_N), ctx.chunk_tokens):
            logits_CV = ctx.transform.apply_(_product(hidden_NH[chunk], weight_VH, bias_V, wide))
            slope = ctx.transform.slope(logits_CV)
            # d logp / d logits = onehot(target) - softmax(logits), in the place of the logits
            grad_CV = logits_CV.sub_(lse_N[chunk, None]).exp_().mul_(-grad_N[chunk, None])
            grad_CV.scatter_add_(1, targets_N[chunk, None], grad_N[chunk, None])
            grad_CV = (grad_CV if slope is None else grad_CV.mul_(slope)).to(narrow)
            if grad_hidden_NH is not None:
                grad_hidden_NH[chunk] = linear(grad_CV, weight_VH.T)
            if wants_weight:
                grad_weight_VH = _added_product(grad_weight_VH, grad_CV.T, hidden_NH[chunk], wide)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0, dtype=wide)
        if wants_weight and grad_weight_VH is None:  # nothing was scored
            grad_weight_VH = torch.zeros_like(weight_VH)
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
            None,
        )


def _product(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wide: torch.dtype) -> Tensor:
    """``hidden @ weight.T + bias`` in the wide dtype. A GPU writes it there at once: in bfloat16 a logit of 20 would be
    off by up to 1/16, and a log-probability with it.
    """
    if hidden_CH.is_cuda and hidden_CH.dtype != wide:
        product_CV = torch.mm(hidden_CH, weight_VH.T, out_dtype=wide)
        return product_CV if bias_V is None else product_CV.add_(bias_V)
    return linear(hidden_CH, weight_VH, bias_V).to(wide)


def _added_product(sum_VH: Tensor | None, grad_VC: Tensor, hidden_CH: Tensor, wide: torch.dtype) -> Tensor:
    """``sum + grad @ hidden`` in the wide dtype, in place of the sum; None is no sum yet.

    A GPU adds while it multiplies: one more pass over something as large as the head takes nearly as long as that.
    """
    if grad_VC.is_cuda and grad_VC.dtype != wide:
        if sum_VH is None:
            return torch.mm(grad_VC, hidden_CH, out_dtype=wide)
        return torch.addmm(sum_VH, grad_VC, hidden_CH, out_dtype=wide, out=sum_VH)
    product_VH = linear(grad_VC, hidden_CH.T).to(wide)
    return product_VH if sum_VH is None else sum_VH.add_(product_VH)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)

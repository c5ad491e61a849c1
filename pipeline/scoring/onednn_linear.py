"""Linear layers in float32 on a CPU, by oneDNN.

PyTorch sends float32 products to MKL, which keeps to 256-bit instructions on processors that are not Intel's. oneDNN,
which PyTorch brings along and uses for bfloat16, takes the widest there are: on an AMD EPYC of the Zen 5 generation it
is 2.2 times as fast forward and for the input's gradient, 1.8 times for the weight's. Other dtypes and devices go
the usual way.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, (…, K) to (…, N); without gradients."""
    on_cpu = x.device.type == "cpu" and x.numel() > 0
    if on_cpu and x.dtype == weight_NK.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # The operator behind torch.compile's linear layers; it takes transposed matrices as they lie.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
        return product
    return F.linear(x, weight_NK, bias_N)


class OneDnnLinear(nn.Linear):
    """An ``nn.Linear`` whose products are oneDNN's; made from one by :func:`install_onednn_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) to (…, N)."""
        if not torch.is_grad_enabled():
            return linear(input, self.weight, self.bias)
        product: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


def install_onednn_linear(model: nn.Module) -> None:
    """Let every plain float32 linear layer of a model on a CPU use oneDNN; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            module.__class__ = OneDnnLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        # The parameter itself is kept, not what lies in it now: ZeRO-3 empties it and fills it again for backward.
        ctx.save_for_backward(x, weight_NK)
        return linear(x, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight_NK.T) if wants_x else None,
            linear(grad_MN.T, x.reshape(-1, x.shape[-1]).T) if wants_weight else None,
            grad_MN.sum(dim=0) if wants_bias else None,
        )

"""Float32 linear layers by oneDNN: the same layer, computed by another library."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.pipeline.scoring.onednn_linear import OneDnnLinear, install_onednn_linear, linear
from torch import nn
from torch.nn import functional as F  # noqa: N812


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (0, 24)], ids=str)
def test_values_and_gradients_are_those_of_the_layer_it_was(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    truth = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    truth.load_state_dict(plain.state_dict())
    install_onednn_linear(plain)
    assert type(plain) is OneDnnLinear
    x = torch.randn(shape, requires_grad=True)
    x_truth = x.detach().double().requires_grad_()
    weights = torch.randn(*shape[:-1], 40)

    (plain(x) * weights).sum().backward()
    (truth(x_truth) * weights).sum().backward()

    torch.testing.assert_close(plain(x).double(), truth(x_truth), rtol=1e-5, atol=1e-5)
    for ours, theirs in [(x, x_truth), *zip(plain.parameters(), truth.parameters(), strict=True)]:
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient_and_let_it_through() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    install_onednn_linear(layer)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 8))


def test_transposed_matrices_are_read_as_they_lie() -> None:
    x, weight = torch.randn(24, 7).T, torch.randn(24, 40).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay_plain_layers(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 8, dtype=dtype)
    install_onednn_linear(layer)
    assert type(layer) is nn.Linear
    x = torch.randn(3, 8, dtype=dtype)
    assert torch.equal(linear(x, layer.weight, layer.bias), layer(x))


def test_a_subclass_of_linear_keeps_its_own_forward_pass() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layer = Doubled(8, 8)
    install_onednn_linear(layer)
    assert type(layer) is Doubled

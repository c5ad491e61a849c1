"""Weights in four bits: the NF4 of QLoRA (arXiv 2305.14314), by bitsandbytes.

A quantized model is a model of its own, far beyond rounding from the one it was made of. What is scored and what is
trained therefore go through this one file, so that both have the same codes, the same layers and the same products.
Every linear layer but the vocabulary head is quantized, in blocks of 64 with their scales quantized again; products
are made in the dtype that the rest of the model has. Experts that lie in one three-dimensional weight stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ...errors import DpoCacheError

NF4 = "nf4"

# On a CPU bitsandbytes complains as soon as it is imported (peft does) that a kernel is missing which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def loading_options(
    quantization: str | None, config: Any, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told besides; nothing for weights as they are.

    Args:
        quantization: None or ``nf4``.
        config: The model's config.
        dtype: Of the weights before they are quantized, of those that stay, and of the products.
        device: Where the weights are quantized, and stay.

    Raises:
        DpoCacheError: bitsandbytes is not installed, the checkpoint is quantized already, or another kind of
            quantization.
    """
    if quantization is None:
        return {}
    if quantization != NF4:
        raise DpoCacheError(f"quantization to {quantization} is not known", expected=NF4)
    already = getattr(config, "quantization_config", None)
    if already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else type(already).__name__
        raise DpoCacheError(
            f"the checkpoint is quantized already (its config.json has a quantization_config: {method})",
            expected="full weights to quantize",
            next_step="take the model that it was made from",
        )
    require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=NF4,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": str(device)},
    }


def require_bitsandbytes() -> None:
    """Make sure of what quantizes.

    Raises:
        DpoCacheError: It is not installed, or does not run here.
    """
    try:
        import accelerate  # noqa: F401  (transformers places quantized weights with it; peft brings it along)
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise DpoCacheError(
            f"quantized weights need bitsandbytes, which cannot be imported: {error}",
            next_step="pip install 'dpo-cache[qlora]'",
        ) from error


def prepare_quantized_layers(model: nn.Module) -> None:
    """Let quantized layers give the same values without gradients as with them, and keep them out of checkpoints.

    On a CPU that has the instructions, bitsandbytes packs a layer's weight anew in its first pass without gradients
    and computes in bfloat16 from then on, whatever dtype it was told, and without a backward pass.
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_leave_scales_out)


def _leave_scales_out(_layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Scales are no parameters, so nobody takes them for frozen; without their weight they are of no use."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def quantized_layers(model: nn.Module) -> list[Any]:
    """The layers whose weights are quantized; none in a model as it is."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [layer for layer in linears if hasattr(layer.weight, "quant_state")]


def num_elements(parameter: Any) -> int:
    """How many numbers a parameter stands for: partitioned by ZeRO-3, packed two to a byte, or as it is."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))

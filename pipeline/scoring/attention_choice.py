"""Which attention kernel a model is loaded with unless one is asked for."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ...errors import DpoCacheError
from .attention_masks import FULL, SLIDING, LayerWindows
from .attention_names import ATTENTION_KERNELS

FLEX_HEAD_SIZES = (64, 128, 256)
"""Those that torch has tried out block sizes of flex_attention for."""
FLEX_ARCHITECTURES = ((8, 0), (9, 0), (10, 0), (10, 3))
"""The NVIDIA GPUs that it has tried them out on (A100, H100 and H200, B200 and B300); those in between, made for
graphics, have too little shared memory for the same blocks."""


def resolve_attention(choice: str | None, config: Any, device: torch.device) -> str:
    """The attention kernel to load a model with: ``choice``, or the quickest of those it surely runs with.

    Raises:
        DpoCacheError: ``choice`` is no kernel that we know.
    """
    if choice is not None:
        if choice not in ATTENTION_KERNELS:
            raise DpoCacheError(
                f"--attn-implementation {choice} is not known", expected=f"one of {', '.join(ATTENTION_KERNELS)}"
            )
        return choice
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "sdpa"  # code from the Hub: transformers tells on loading whether it can
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if device.type == "cuda" and model_class._supports_flex_attn:
        surely = gpu_surely_runs_flex(device) and _model_runs_flex(model_class, config)
        if surely or not model_class._supports_sdpa:
            return "flex_attention"
    return "sdpa" if model_class._supports_sdpa else "eager"


def gpu_surely_runs_flex(device: torch.device) -> bool:
    """Whether flex_attention's blocks fit this GPU, and triton is there to compile them."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) in FLEX_ARCHITECTURES


def _model_runs_flex(model_class: Any, config: Any) -> bool:
    """Whether its heads fit, and whether it can be scored in packed rows, which are what makes this kernel quick."""
    config = config.get_text_config()
    heads_differ = getattr(config, "is_heterogeneous", False) or getattr(config, "v_head_dim", None)
    takes_trees = not model_class._is_stateful and LayerWindows.of_config(config).layer_types <= {FULL, SLIDING}
    if heads_differ or not takes_trees:
        return False
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_size in FLEX_HEAD_SIZES

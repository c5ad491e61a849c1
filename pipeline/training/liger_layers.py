"""Liger's kernels for the layers between the embedding and the vocabulary head: rotary embedding, norms, gated MLPs.

Its fused losses are left out: they take no cached reference, and the head here is chunked already.
"""

from __future__ import annotations

import torch
from torch import nn

from ...errors import DpoCacheError
from ..scoring.model_loading import find_causal_lm


def use_liger_layers(model: nn.Module) -> None:
    """Put Liger's kernels in place of the layers of a model of transformers.

    Raises:
        DpoCacheError: There is no GPU, or Liger does not know the architecture.
    """
    if not torch.cuda.is_available():
        raise DpoCacheError(
            "--use-liger-kernel needs a GPU: Liger's kernels are written in Triton",
            next_step="leave --use-liger-kernel out",
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    causal_lm = find_causal_lm(model)
    model_type = causal_lm.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise DpoCacheError(
            f"--use-liger-kernel: Liger has no kernels for {model_type} models",
            expected=f"one of {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}",
            next_step="leave --use-liger-kernel out",
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=causal_lm, cross_entropy=False, fused_linear_cross_entropy=False)

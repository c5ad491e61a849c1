"""Settings of torch's attention kernels, made before one of them first runs."""

from __future__ import annotations

import torch

from .tree_attention import install_tree_attention

MOST_VARIANTS = 64
"""Variants of a compiled function: with and without gradients, each kind of layer, fixed and varying lengths."""


def prepare_kernels(kernel: str) -> None:
    """Make torch's kernels fit for rows whose length changes with every batch.

    Args:
        kernel: The one that the model was loaded with.
    """
    install_tree_attention()
    # On Hopper and Blackwell torch would choose cuDNN's attention, which plans anew for every shape (up to a second),
    # and whose backward pass gives NaN for some masked shapes (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if kernel == "flex_attention":
        # Beyond its limit, 8 at first, torch.compile silently falls back to attention over the whole square of a row.
        torch._dynamo.config.recompile_limit = MOST_VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True

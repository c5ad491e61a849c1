"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...errors import DpoCacheError


def recompute_activations(model: nn.Module, *, kept_share: float = 0.0) -> None:
    """Let layers recompute their activations, all but a share of them, evenly spread.

    Args:
        model: A model of transformers, or a peft model around one.
        kept_share: Share of the layers that keep their activations, from 0 to 1: memory and time in between.

    Raises:
        DpoCacheError: A share is to be kept, and the model's layers cannot be told to one by one.
    """
    policy: Any = model
    # Not reentrant: the other kind finds nothing to differentiate behind frozen embeddings.
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not kept_share:
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise DpoCacheError(
            "--activation-memory-budget cannot be kept by this model, whose layers recompute all together",
            next_step="--gradient-checkpointing recomputes all of them",
        )
    for number, layer in enumerate(layers):
        if int((number + 1) * kept_share) > int(number * kept_share):
            layer.gradient_checkpointing = False

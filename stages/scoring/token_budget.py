"""How many tokens one forward pass may hold: found on a GPU, halved when memory runs out."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import DpoCacheError
from ...pipeline.scoring.model_loading import find_backbone, find_head

CPU_TOKENS = 8192
SMALLEST_START, LARGEST_START = 2048, 65_536
"""A GPU is busy with the larger one whatever the model; the smaller one fits wherever the weights do."""
SHARE_OF_FREE_MEMORY = 0.5


class TokenBudget:
    """The budget of one scoring process.

    Args:
        requested: The user's; None to go by the device.
        device: Where the model lies, loaded already.
        model: The model.
    """

    def __init__(self, requested: int | None, *, device: torch.device, model: nn.Module) -> None:
        self.tokens = requested or _start(device, model)

    def shrink(self, *, failed_tokens: int, num_pairs: int) -> None:
        """A batch of that size did not fit: go on with half of it.

        Raises:
            DpoCacheError: It was a single pair, which cannot be made smaller.
        """
        if num_pairs == 1:
            raise DpoCacheError(
                f"a single pair of {failed_tokens} tokens does not fit into the device's memory",
                next_step="a smaller --max-seq-length, or --zero-stage 3 on several GPUs",
            )
        self.tokens = min(self.tokens, max(1, failed_tokens // 2))


def _start(device: torch.device, model: nn.Module) -> int:
    if device.type == "cpu":
        return CPU_TOKENS
    free_bytes, _ = torch.cuda.mem_get_info(device)
    head = find_head(model)
    hidden = head.in_features
    # Of the layers, not of the config, where sizes have many names and may differ from layer to layer.
    layers = (layer for layer in find_backbone(model).modules() if isinstance(layer, nn.Linear))
    intermediate = max((layer.out_features for layer in layers), default=4 * hidden)
    # Without gradients one layer's activations live at a time: the widest are those of its feed-forward part.
    widest = 8 * hidden + 4 * intermediate
    fitting = int(SHARE_OF_FREE_MEMORY * free_bytes) // (widest * head.weight.dtype.itemsize)
    return min(max(fitting, SMALLEST_START), LARGEST_START)

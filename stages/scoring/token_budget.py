"""How many tokens one forward pass may hold: found on a GPU, halved when memory runs out."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import DpoCacheError

CPU_TOKENS = 8192
SMALLEST_START, LARGEST_START = 2048, 65_536
"""A GPU is busy with the larger one whatever the model; the smaller one fits wherever the weights do."""
SHARE_OF_FREE_MEMORY = 0.5


class TokenBudget:
    """The budget of one scoring process.

    Args:
        requested: The user's; None to go by the device.
        device: Where the model lies, loaded already.
        config: The model's config.
        itemsize: Bytes of an activation.
    """

    def __init__(self, requested: int | None, *, device: torch.device, config: Any, itemsize: int) -> None:
        self.tokens = requested or _start(device, config.get_text_config(), itemsize)

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


def _start(device: torch.device, config: Any, itemsize: int) -> int:
    if device.type == "cpu":
        return CPU_TOKENS
    free_bytes, _ = torch.cuda.mem_get_info(device)
    hidden: int = config.hidden_size
    # Without gradients one layer's activations live at a time: the widest are those of its feed-forward part.
    widest: int = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    fitting = int(SHARE_OF_FREE_MEMORY * free_bytes) // (widest * itemsize)
    return min(max(fitting, SMALLEST_START), LARGEST_START)

"""Mixture-of-experts blocks, which a partitioned model must gather whole.

Which experts run differs from rank to rank and from pass to pass. ZeRO-3 gathers the weights of a module when it is
called, so experts that are modules of their own would make one rank wait for a gather that the others never join.
"""

from __future__ import annotations

from typing import Any

from deepspeed.utils import set_z3_leaf_modules
from torch import nn

from ...errors import DpoCacheError
from ..scoring.model_loading import find_causal_lm


def expert_blocks(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of the modules that hold a router and experts; none in a dense model."""
    return {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)}


def gather_expert_blocks_whole(model: nn.Module) -> None:
    """Have ZeRO-3 gather each block with all its experts at once; before the engine is made, no effect without."""
    blocks = expert_blocks(model)
    if blocks:
        set_z3_leaf_modules(model, sorted(blocks, key=lambda block: block.__name__))


def can_be_balanced(model: nn.Module) -> bool:
    """Whether there are experts, and a router that shows its logits."""
    return _obstacle(model) is None


def refuse_load_balancing(model: nn.Module) -> None:
    """Refuse a model that has nothing to balance.

    Raises:
        DpoCacheError: It has no experts, or does not give the router's logits.
    """
    if (obstacle := _obstacle(model)) is not None:
        raise DpoCacheError(f"--load-balancing-loss {obstacle}", next_step="leave --load-balancing-loss out")


def _obstacle(model: nn.Module) -> str | None:
    """Why the experts of a model cannot be balanced; None where they can."""
    config: Any = find_causal_lm(model).config
    if not expert_blocks(model):
        return f"means nothing to a {config.model_type} model, which has no experts"
    if not hasattr(config, "output_router_logits"):
        return f"cannot be computed for {config.model_type} models, which do not give the logits of their router"
    return None

"""Useful floating-point operations of a forward pass, for model FLOPs utilisation.

The convention, which figures elsewhere may not share: two operations a multiply-add; every weight matrix that a
token passes, active experts only; attention over couples (query, key) that the mask lets through, so causal
attention counts half; the vocabulary head on scored positions only; a prompt that is computed once counts once. No
padding, no recomputation, no embedding look-up. A backward pass counts twice a forward pass; once where the weights
are frozen under an adapter, whose own matrices are counted as weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention_masks import FULL, SLIDING
from .model_loading import find_backbone, find_causal_lm, find_head
from .quantization import num_elements


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """What a token costs.

    Attributes:
        backbone_weights: Elements of the matrices that a token passes, the vocabulary head left out.
        head_weights: Elements of the vocabulary head.
        attention_width: Query width (heads times head size), summed over the attention layers.
        backward_forwards: Forward passes that a backward pass costs.
    """

    backbone_weights: int
    head_weights: int
    attention_width: int
    backward_forwards: int = 2

    @classmethod
    def of_model(cls, model: nn.Module) -> ModelCost:
        """Counted on the model itself, partitioned by ZeRO-3 or not."""
        config = find_causal_lm(model).config.get_text_config()
        return cls(
            backbone_weights=sum(_passed_elements(find_backbone(model), config)),
            head_weights=num_elements(find_head(model).weight),
            attention_width=_attention_width(config),
            backward_forwards=2 if find_head(model).weight.requires_grad else 1,
        )


def forward_flops(cost: ModelCost, *, num_tokens: int, num_attended: int, num_scored: int) -> int:
    """Floating-point operations of one forward pass.

    Args:
        cost: Of the model.
        num_tokens: Tokens processed, padding excluded.
        num_attended: Couples (query, key) of one full attention layer; sliding layers are counted as full ones.
        num_scored: Positions that went through the vocabulary head.
    """
    # Attention: a product with the keys and one with the values.
    return 2 * (
        cost.backbone_weights * num_tokens + 2 * cost.attention_width * num_attended + cost.head_weights * num_scored
    )


def _passed_elements(backbone: nn.Module, config: Any) -> Iterator[int]:
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    for module in backbone.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 3 and shape[0] == num_experts:
                yield num_elements(parameter) * config.num_experts_per_tok // num_experts
            elif len(shape) >= 2:
                yield num_elements(parameter)


def _attention_width(config: Any) -> int:
    """Query widths of all attention layers together; what the state of other layers costs is not counted."""
    layer_types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    # The layers of Gemma 4 differ in their heads: its config refuses to name one size for all.
    differ = getattr(config, "is_heterogeneous", False)
    configs = config.per_layer_config if differ else [config] * len(layer_types)
    return sum(
        _query_width(configs[number]) for number, layer_type in enumerate(layer_types) if layer_type in (FULL, SLIDING)
    )


def _query_width(config: Any) -> int:
    """0 in a model without attention."""
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))

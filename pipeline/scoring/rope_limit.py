"""Up to which length a model's rotary embedding leaves a sequence alone."""

from __future__ import annotations

from typing import Any


def rope_limit(config: Any) -> int | None:
    """The longest sequence whose logps do not depend on what else is in the batch; None without such a limit.

    transformers' ``dynamic`` and ``longrope`` embeddings take their frequencies from the longest sequence of a batch
    as soon as it exceeds the length the model was first trained on: a short sequence beside a long one would get
    other values than alone.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        rope_type = rope.get("rope_type", "default")
        if rope_type == "longrope":
            limits.append(int(rope["original_max_position_embeddings"]))
        elif "dynamic" in rope_type:
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)

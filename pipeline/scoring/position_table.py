"""How many positions a model has embeddings for, where it looks them up in a table."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from torch import nn

# The names that transformers' models give such a table: a weight (GPT-2, OPT), or a buffer of sines (GPT-J, CodeGen).
_TABLE = re.compile(r"(.*\.)?((wpe|embed_positions|positions_embed|position_embeddings)\.weight|embed_positions)")


def position_limit(backbone: nn.Module, config: Any) -> int | None:
    """The longest sequence that a position table reaches; None for a model that computes its positions.

    Beyond it the look-up fails: on a CPU with an IndexError, on a GPU by taking the whole process down.
    """
    names = (name for name, _ in chain(backbone.named_parameters(), backbone.named_buffers()))
    if not any(map(_TABLE.fullmatch, names)):
        return None
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions

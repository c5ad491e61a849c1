"""The tree mask in the form that each attention kernel reads.

transformers hands a mask of four dimensions to the kernel as it is: nothing is checked, converted or windowed. So
it has to be in exactly the kernel's form (a bool mask given to eager attention is added to the scores as 0 and 1),
and a model with sliding windows needs a windowed mask of its own. A window is a distance in positions: in a shared
row the second response lies far behind its prompt, and would lose it by a distance in columns.

Shapes: R rows, T tokens a row (Q queries, K keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .scoring_batch import Layout, ScoringBatch
from .tree_attention import with_segments

FULL, SLIDING = "full_attention", "sliding_attention"
TREE_KERNELS = ("sdpa", "eager", "flex_attention")
"""Kernels that take an arbitrary mask; flash attention takes none."""

Mask = Tensor | BlockMask


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWindows:
    """Which kinds of attention layers a model has.

    Attributes:
        layer_types: Names as in a transformers config; anything but full and sliding attention cannot run a tree.
        window: Positions a sliding layer sees, itself included; None without sliding layers.
    """

    layer_types: frozenset[str]
    window: int | None

    @classmethod
    def of_config(cls, config: Any) -> LayerWindows:
        """Read ``layer_types`` where a config has them, else whether all its layers slide."""
        config = config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        named = getattr(config, "layer_types", None)
        layer_types = frozenset(named) if named else frozenset([FULL if window is None else SLIDING])
        return cls(layer_types=layer_types, window=window if SLIDING in layer_types else None)


def attention_mask(
    batch: ScoringBatch, *, windows: LayerWindows, kernel: str, dtype: torch.dtype
) -> Mask | dict[str, Mask] | None:
    """What to pass as a model's ``attention_mask``.

    None for padded rows: they are causal, padding on the right is seen by no real token, and without a mask every
    kernel takes its fast causal path. One mask where all layers are of a kind, else one for each kind.
    """
    if batch.layout is Layout.PADDED:
        return None
    window_of = {FULL: None, SLIDING: windows.window}
    masks = {name: _mask(batch, window_of[name], kernel, dtype) for name in sorted(windows.layer_types)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask(batch: ScoringBatch, window: int | None, kernel: str, dtype: torch.dtype) -> Mask:
    assert kernel in TREE_KERNELS, kernel
    if kernel == "flex_attention":
        return block_mask(batch, window)
    visible_R1QK = dense_mask(batch, window)
    if kernel == "sdpa" and not visible_R1QK.is_cuda:
        return with_segments(visible_R1QK, batch, windowed=window is not None)
    # Of a bool mask, sdpa on a GPU makes an additive one in every layer anew, and keeps them all for the backward pass.
    return additive_mask(visible_R1QK, dtype)


def dense_mask(batch: ScoringBatch, window: int | None = None) -> Tensor:
    """Bool (R, 1, T, T), True where the query (third axis) sees the key (fourth)."""
    segment_R1K = batch.segment_RT[:, None, :]
    visible_RQK = segment_R1K == batch.segment_RT[:, :, None]
    visible_RQK |= segment_R1K == batch.trunk_RT[:, :, None]
    visible_RQK = visible_RQK.tril_()
    if window is not None:
        position_RT = batch.position_ids_RT
        visible_RQK &= position_RT[:, None, :] > position_RT[:, :, None] - window
    return visible_RQK[:, None]


def additive_mask(visible_R1QK: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the most negative finite number elsewhere: what eager attention adds to its scores."""
    nothing = torch.zeros_like(visible_R1QK, dtype=dtype)
    return nothing.masked_fill_(~visible_R1QK, torch.finfo(dtype).min)


def block_mask(batch: ScoringBatch, window: int | None = None) -> BlockMask:
    """The same mask for flex_attention, which skips blocks that nothing in them sees."""
    segment_RT, trunk_RT, position_RT = batch.segment_RT, batch.trunk_RT, batch.position_ids_RT

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segment_RT[row, key]
        related = (segment == segment_RT[row, query]) | (segment == trunk_RT[row, query])
        visible = related & (key <= query)
        if window is not None:
            visible = visible & (position_RT[row, key] > position_RT[row, query] - window)
        return visible

    num_rows, width = segment_RT.shape
    # Compiled on a GPU, where the eager way would hold the dense (R, T, T) mask that this layout exists to avoid.
    create = torch.compile(create_block_mask) if segment_RT.is_cuda else create_block_mask
    with torch.no_grad():  # or it would be compiled once more for training
        return create(sees, B=num_rows, H=None, Q_LEN=width, KV_LEN=width, device=segment_RT.device)

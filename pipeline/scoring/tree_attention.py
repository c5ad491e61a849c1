"""Attention segment by segment on a CPU, where a dense mask costs as much as everything it hides.

The kernel that takes a mask visits every couple (query, key), so that of a row with five responses most are visited
for nothing. Here each prompt is a causal call of its own and each response one more, with the keys of its prompt
before its own. That is the same attention by the same kernel: what changes is which hidden couples are never
visited.

transformers hands a mask of four dimensions to the attention function as it is, and so a mask tensor can carry the
segments it was made from. A mask that has lost them, and a mask of anybody else's, is attended to densely.

Shapes: R rows, T tokens a row, Q queries, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .scoring_batch import ScoringBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A prompt, a response or padding, as columns of one row, and what it sees beside itself.

    Attributes:
        row: The row it lies in.
        own: Its columns.
        trunk: The columns of its prompt; empty for a prompt itself.
        visible_11QK: Bool; which of trunk and own columns each of its tokens sees. None where that is plain causality.
    """

    row: int
    own: slice
    trunk: slice
    visible_11QK: Tensor | None

    def keys_of(self, states: Tensor) -> Tensor:
        """The keys or values, (1, heads, K, size), that the segment may see."""
        row = states[self.row : self.row + 1]
        if self.trunk.stop == self.own.start:  # the first response lies right behind its prompt
            return row[:, :, self.trunk.start : self.own.stop]
        return torch.cat([row[:, :, self.trunk], row[:, :, self.own]], dim=2)


def with_segments(visible_R1QK: Tensor, batch: ScoringBatch, *, windowed: bool) -> Tensor:
    """The dense mask, carrying the segments that :func:`tree_sdpa_attention` goes by; on a GPU as it is."""
    if visible_R1QK.device.type == "cpu":
        visible_R1QK._dpo_cache_segments = _segments(visible_R1QK, batch, windowed=windowed)  # type: ignore[attr-defined]
    return visible_R1QK


def _segments(visible_R1QK: Tensor, batch: ScoringBatch, *, windowed: bool) -> list[Segment]:
    segments: list[Segment] = []
    for row, (segment_T, trunk_T) in enumerate(zip(batch.segment_RT.numpy(), batch.trunk_RT.numpy(), strict=True)):
        starts = np.flatnonzero(np.diff(segment_T, prepend=segment_T[0] - 1))
        stops = np.append(starts[1:], len(segment_T))
        columns_of = {
            int(segment_T[start]): slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)
        }
        for number, own in columns_of.items():
            prompt = int(trunk_T[own.start])
            trunk = slice(own.start, own.start) if prompt == number else columns_of[prompt]
            seen = None
            if windowed or prompt != number:
                of_row = visible_R1QK[row : row + 1, :, own]
                seen = torch.cat([of_row[..., trunk], of_row[..., own]], dim=-1)
            segments.append(Segment(row=row, own=own, trunk=trunk, visible_11QK=seen))
    return segments


def tree_sdpa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, called once a segment where the mask carries segments."""
    segments: list[Segment] | None = getattr(attention_mask, "_dpo_cache_segments", None)
    if segments is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended, None
    rows: list[list[Tensor]] = [[] for _ in range(len(query))]
    for segment in segments:
        attended, _ = sdpa_attention_forward(
            module,
            query[segment.row : segment.row + 1, :, segment.own],
            segment.keys_of(key),
            segment.keys_of(value),
            segment.visible_11QK,
            **{**options, "is_causal": segment.visible_11QK is None},
        )
        rows[segment.row].append(attended)
    return torch.cat([torch.cat(row, dim=1) for row in rows]), None


def install_tree_attention() -> None:
    """Let every model that attends through transformers' ``sdpa`` do so by segments where its mask has them."""
    AttentionInterface.register("sdpa", tree_sdpa_attention)

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .scoring_batch import ScoringBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A prompt, a response or padding: what it sees beside itself.

    Attributes:
        trunk: Place of its prompt among the segments of its row; None for a prompt itself.
        visible_11QK: Bool; which columns of trunk and segment each of its tokens sees. None where that is plain
            causality.
    """

    trunk: int | None
    visible_11QK: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentedRow:
    """The segments of a row, as they lie, and how many columns each of them has."""

    segments: list[Segment]
    lengths: list[int]


def with_segments(visible_R1QK: Tensor, batch: ScoringBatch, *, windowed: bool) -> Tensor:
    """The dense mask, carrying the segments that :func:`tree_sdpa_attention` goes by."""
    visible_R1QK._dpo_cache_segments = [  # type: ignore[attr-defined]
        _segmented(visible_11QK, segment_T, trunk_T, windowed=windowed)
        for visible_11QK, segment_T, trunk_T in zip(
            torch.split(visible_R1QK, 1), batch.segment_RT.numpy(), batch.trunk_RT.numpy(), strict=True
        )
    ]
    return visible_R1QK


def _segmented(
    visible_11QK: Tensor, segment_T: npt.NDArray[np.int64], trunk_T: npt.NDArray[np.int64], *, windowed: bool
) -> SegmentedRow:
    starts = np.flatnonzero(np.diff(segment_T, prepend=segment_T[0] - 1))
    lengths: list[int] = np.diff(starts, append=len(segment_T)).tolist()
    place_of = {int(segment_T[start]): place for place, start in enumerate(starts)}
    segments = []
    for place, start in enumerate(starts):
        prompt = place_of[int(trunk_T[start])]
        trunk = None if prompt == place else prompt
        seen = None
        if windowed or trunk is not None:
            of_segment = torch.split(visible_11QK[:, :, start : start + lengths[place]], lengths, dim=-1)
            seen = _behind_trunk(of_segment, trunk, place, dim=-1)
        segments.append(Segment(trunk=trunk, visible_11QK=seen))
    return SegmentedRow(segments=segments, lengths=lengths)


def _behind_trunk(pieces: Sequence[Tensor], trunk: int | None, place: int, *, dim: int) -> Tensor:
    """A segment's piece, behind that of its prompt."""
    return pieces[place] if trunk is None else torch.cat([pieces[trunk], pieces[place]], dim=dim)


def tree_sdpa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, called once a segment where the mask carries segments."""
    rows: list[SegmentedRow] | None = getattr(attention_mask, "_dpo_cache_segments", None)
    if rows is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return attended, None
    of_rows = zip(rows, *(torch.split(states, 1) for states in (query, key, value)), strict=True)
    return torch.cat([_attend(module, *of_row, **options) for of_row in of_rows]), None


def _attend(
    module: torch.nn.Module, row: SegmentedRow, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> Tensor:
    # Split once: the backward pass of a slice fills a whole row with zeros, that of a split joins its pieces.
    queries, keys, values = (torch.split(states, row.lengths, dim=2) for states in (query, key, value))
    attended = [
        sdpa_attention_forward(
            module,
            queries[place],
            _behind_trunk(keys, segment.trunk, place, dim=2),
            _behind_trunk(values, segment.trunk, place, dim=2),
            segment.visible_11QK,
            **{**options, "is_causal": segment.visible_11QK is None},
        )[0]
        for place, segment in enumerate(row.segments)
    ]
    return torch.cat(attended, dim=1)


def install_tree_attention() -> None:
    """Let every model that attends through transformers' ``sdpa`` do so by segments where its mask has them."""
    AttentionInterface.register("sdpa", tree_sdpa_attention)

"""Pairs to a :class:`ScoringBatch`, in each of the three layouts.

One builder serves all three. It lays out *trees*, a prompt (the trunk) and responses that branch off its end, in
rows. The padded layout is the case of one response a tree and one tree a row, where the tree mask is plainly
causal. What differs between layouts is only which trees there are and which of them share a row.

Shapes: as in ``scoring_batch.py``: S sides, R rows, T tokens a row, N scored tokens, M references to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..data.token_pair import TokenIds, TokenPair
from .bin_packing import even_bins
from .prompt_group import PromptGroup, Tree, group_by_prompt
from .scoring_batch import Layout, ScoringBatch
from .shape_rounding import ROW_MULTIPLE, rounded_up

ROW_TOKENS = 2048
"""Groups share a row up to about this: a GPU attends over the whole square of a row, hidden couples too."""
NUMBERS_TRIED = 8
"""Numbers of rows compared; the first ones hardly ever leave more than 2% of padding."""
FLEX_BLOCK_TOKENS = 128
"""Rows for flex_attention are a multiple of its block, so that few shapes are ever compiled."""

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def padded_batch(pairs: Sequence[TokenPair], *, multiple: int = ROW_MULTIPLE) -> ScoringBatch:
    """One right-padded row for every distinct sequence, the longest rounded up to ``multiple``."""
    groups = group_by_prompt(pairs)
    trees = [
        Tree(prompt_ids=group.prompt_ids, responses=(response,)) for group in groups for response in group.responses
    ]
    first_tree = np.cumsum([0] + [len(group.responses) for group in groups])
    side_of = _sides(groups, lambda group, response: (int(first_tree[group]) + response, 0))
    rows = [[tree] for tree in range(len(trees))]
    return _lay_out(Layout.PADDED, pairs, trees, side_of, rows=rows, multiple=multiple)


def prefix_shared_batch(pairs: Sequence[TokenPair], *, multiple: int = ROW_MULTIPLE) -> ScoringBatch:
    """Prompt groups in rows alike in length, rounded up to ``multiple``; as many rows as leave least padding."""
    groups = group_by_prompt(pairs)
    rows = _even_rows([group.num_tokens for group in groups], multiple)
    return _lay_out_groups(Layout.PREFIX_SHARED, pairs, groups, rows=rows, multiple=multiple)


def _even_rows(lengths: Sequence[int], multiple: int) -> list[list[int]]:
    """Groups in rows of least padding, none much longer than :data:`ROW_TOKENS` unless a group is."""
    total, longest = sum(lengths), max(lengths)
    fewest = -(-total // max(longest, ROW_TOKENS))
    most = max(fewest, min(total // longest, fewest + NUMBERS_TRIED - 1))
    candidates = [even_bins(lengths, num_rows) for num_rows in range(fewest, most + 1)]

    def computed_tokens(rows: list[list[int]]) -> int:
        return len(rows) * rounded_up(max(sum(lengths[group] for group in row) for row in rows), multiple)

    return min(candidates, key=computed_tokens)


def packed_batch(pairs: Sequence[TokenPair]) -> ScoringBatch:
    """All prompt groups in one row, its length rounded up to flex_attention's block."""
    groups = group_by_prompt(pairs)
    return _lay_out_groups(Layout.PACKED, pairs, groups, rows=[list(range(len(groups)))], multiple=FLEX_BLOCK_TOKENS)


_BUILDERS: dict[Layout, Callable[[Sequence[TokenPair]], ScoringBatch]] = {
    Layout.PADDED: padded_batch,
    Layout.PREFIX_SHARED: prefix_shared_batch,
    Layout.PACKED: packed_batch,
}


def scoring_batch(pairs: Sequence[TokenPair], layout: Layout) -> ScoringBatch:
    """The pairs in the given layout; no pairs give the empty batch."""
    return _BUILDERS[layout](pairs) if pairs else empty_batch(layout)


def empty_batch(layout: Layout) -> ScoringBatch:
    """No pairs and one token: what a rank without work runs, so that its collectives meet the others'."""
    tree = Tree(prompt_ids=np.zeros(1, dtype=np.int32), responses=())
    multiple = FLEX_BLOCK_TOKENS if layout is Layout.PACKED else ROW_MULTIPLE
    return _lay_out(layout, [], [tree], [], rows=[[0]], multiple=multiple)


def _lay_out_groups(
    layout: Layout,
    pairs: Sequence[TokenPair],
    groups: Sequence[PromptGroup],
    *,
    rows: list[list[int]],
    multiple: int,
) -> ScoringBatch:
    side_of = _sides(groups, lambda group, response: (group, response))
    return _lay_out(layout, pairs, groups, side_of, rows=rows, multiple=multiple)


def _sides(groups: Sequence[PromptGroup], place: Callable[[int, int], tuple[int, int]]) -> list[tuple[int, int]]:
    """For each of the S sides, its (tree, response), ``place`` telling where a group's response went."""
    num_pairs = sum(len(group.pairs) for group in groups)
    side_of = [(0, 0)] * (2 * num_pairs)
    for number, group in enumerate(groups):
        for pair, chosen, rejected in zip(group.pairs, group.chosen, group.rejected, strict=True):
            side_of[pair] = place(number, chosen)
            side_of[num_pairs + pair] = place(number, rejected)
    return side_of


def _lay_out(
    layout: Layout,
    pairs: Sequence[TokenPair],
    trees: Sequence[Tree],
    side_of: Sequence[tuple[int, int]],
    *,
    rows: list[list[int]],
    multiple: int,
) -> ScoringBatch:
    """Write the trees into rows, then say which tokens are scored and which side each counts for.

    A *slot* is a token's flat index into R*T.
    """
    longest_row = max(sum(trees[tree].num_tokens for tree in row) for row in rows)
    width = rounded_up(longest_row, multiple)
    canvas = _Canvas(len(rows), width)
    slots_of_tree: dict[int, tuple[int, list[int]]] = {}
    for row, members in enumerate(rows):
        canvas.start_row(row)
        for tree in members:
            slots_of_tree[tree] = canvas.write(trees[tree])

    if layout is Layout.PADDED:
        # Padding goes on counting: transformers takes a jump in the positions for the start of another sequence.
        canvas.position_ids_RT[:] = np.arange(width)

    slots_of_side = [
        _scored_slots(pairs[side % len(pairs)], slots_of_tree[tree], response, is_chosen=side < len(pairs))
        for side, (tree, response) in enumerate(side_of)
    ]
    tokens_S = np.array([len(slots) for slots in slots_of_side], dtype=np.int64)
    common_S = np.tile(np.minimum(*np.split(tokens_S, 2)), 2)
    slots_M = np.concatenate([np.zeros(0, dtype=np.int64), *slots_of_side])
    rank_M = np.arange(len(slots_M)) - np.repeat(np.cumsum(tokens_S) - tokens_S, tokens_S)

    # A token that several sides score is computed once.
    scored: Bools = np.zeros(len(rows) * width, dtype=np.bool_)
    scored[slots_M] = True
    slots_N = np.flatnonzero(scored)
    return ScoringBatch(
        layout=layout,
        input_ids_RT=torch.from_numpy(canvas.input_ids_RT),
        position_ids_RT=torch.from_numpy(canvas.position_ids_RT),
        segment_RT=torch.from_numpy(canvas.segment_RT),
        trunk_RT=torch.from_numpy(canvas.trunk_RT),
        scored_positions_N=torch.from_numpy(canvas.predictor.reshape(-1)[slots_N]),
        target_ids_N=torch.from_numpy(canvas.input_ids_RT.reshape(-1)[slots_N]),
        token_index_M=torch.from_numpy(np.searchsorted(slots_N, slots_M).astype(np.int64)),
        side_M=torch.from_numpy(np.repeat(np.arange(len(tokens_S)), tokens_S)),
        common_M=torch.from_numpy(rank_M < np.repeat(common_S, tokens_S)),
        tokens_S=torch.from_numpy(tokens_S),
        num_pairs=len(pairs),
        num_tokens=sum(tree.num_tokens for tree in trees),
        num_attended=sum(tree.num_attended for tree in trees),
        longest_sequence=max(tree.longest_sequence for tree in trees),
    )


def _scored_slots(pair: TokenPair, slots_of_tree: tuple[int, list[int]], response: int, *, is_chosen: bool) -> Int64s:
    """Where the scored tokens of one side lie."""
    assert not pair.prompt_scored[0], "nothing predicts the first token of a prompt"
    prompt_slot, response_slots = slots_of_tree
    response_scored = pair.chosen_scored if is_chosen else pair.rejected_scored
    return np.concatenate(
        [
            prompt_slot + np.flatnonzero(pair.prompt_scored),
            response_slots[response] + np.flatnonzero(response_scored),
        ]
    )


class _Canvas:
    """The row tensors while trees are written into them, left to right."""

    def __init__(self, num_rows: int, width: int) -> None:
        shape = (num_rows, width)
        self.input_ids_RT: Int64s = np.zeros(shape, dtype=np.int64)
        self.position_ids_RT: Int64s = np.zeros(shape, dtype=np.int64)
        self.segment_RT: npt.NDArray[np.int32] = np.full(shape, -1, dtype=np.int32)
        self.trunk_RT: npt.NDArray[np.int32] = np.full(shape, -1, dtype=np.int32)
        self.predictor: Int64s = np.arange(num_rows * width, dtype=np.int64).reshape(shape) - 1
        self._row = 0
        self._column = 0
        self._segment = 0

    def start_row(self, row: int) -> None:
        self._row, self._column, self._segment = row, 0, 0

    def write(self, tree: Tree) -> tuple[int, list[int]]:
        """Write one tree; the slots of its first prompt token and of each response's first token."""
        trunk = self._segment
        prompt_slot = self._write_segment(tree.prompt_ids, first_position=0, trunk=trunk)
        last_prompt_slot = prompt_slot + len(tree.prompt_ids) - 1
        response_slots = []
        for response in tree.responses:
            slot = self._write_segment(response, first_position=len(tree.prompt_ids), trunk=trunk)
            self.predictor.reshape(-1)[slot] = last_prompt_slot
            response_slots.append(slot)
        return prompt_slot, response_slots

    def _write_segment(self, token_ids: TokenIds, *, first_position: int, trunk: int) -> int:
        width: int = self.input_ids_RT.shape[1]
        where = (self._row, slice(self._column, self._column + len(token_ids)))
        slot = self._row * width + self._column
        self.input_ids_RT[where] = token_ids
        self.position_ids_RT[where] = np.arange(first_position, first_position + len(token_ids))
        self.segment_RT[where] = self._segment
        self.trunk_RT[where] = trunk
        self._column += len(token_ids)
        self._segment += 1
        return slot

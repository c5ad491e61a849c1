"""What a batch says about its tokens, read back and compared with the pairs it was made from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.attention_masks import dense_mask
from dpo_cache.pipeline.scoring.layouts import (
    empty_batch,
    packed_batch,
    padded_batch,
    prefix_shared_batch,
    scoring_batch,
)
from dpo_cache.pipeline.scoring.scoring_batch import Layout, ScoringBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model_factory import token_ids, token_pairs


@st.composite
def some_pairs(draw: st.DrawFn) -> list[TokenPair]:
    """Up to six pairs over a vocabulary of two, so that prompts and responses often coincide."""
    ids = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(lambda tokens: np.array(tokens, dtype=np.int32))
    pairs = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, chosen, rejected = draw(ids), draw(ids), draw(ids)
        total = len(prompt) + len(chosen) + len(rejected)
        mask = draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total).map(np.array))
        if mask is not None:
            mask[0] = False
        pairs.append(TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, scored_mask=mask))
    return pairs


def sequence(pair: TokenPair, chosen: bool) -> tuple[list[int], list[bool]]:
    response, scored = (pair.chosen_ids, pair.chosen_scored) if chosen else (pair.rejected_ids, pair.rejected_scored)
    return [*pair.prompt_ids.tolist(), *response.tolist()], [*pair.prompt_scored.tolist(), *scored.tolist()]


def visible_history(batch: ScoringBatch, slot: int) -> list[tuple[int, int]]:
    """The (position, id) of all tokens that the token at a slot sees, itself included."""
    row, column = divmod(slot, batch.input_ids_RT.shape[1])
    seen = dense_mask(batch)[row, 0, column].nonzero()[:, 0]
    return sorted(zip(batch.position_ids_RT[row, seen].tolist(), batch.input_ids_RT[row, seen].tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(some_pairs(), st.sampled_from(Layout))
def test_every_scored_token_is_predicted_from_exactly_its_own_history(pairs: list[TokenPair], layout: Layout) -> None:
    batch = scoring_batch(pairs, layout)
    place = 0
    for side in range(2 * len(pairs)):
        ids, scored = sequence(pairs[side % len(pairs)], chosen=side < len(pairs))
        where = [position for position, counts in enumerate(scored) if counts]
        assert batch.tokens_S[side] == len(where)
        for rank, position in enumerate(where):
            assert batch.side_M[place] == side
            token = int(batch.token_index_M[place])
            assert batch.target_ids_N[token] == ids[position]
            history = visible_history(batch, int(batch.scored_positions_N[token]))
            assert history == list(enumerate(ids[:position]))
            common = min(batch.tokens_S[side % len(pairs)], batch.tokens_S[len(pairs) + side % len(pairs)])
            assert batch.common_M[place] == (rank < common)
            place += 1
    assert place == len(batch.token_index_M)


@settings(max_examples=60, deadline=None)
@given(some_pairs(), st.sampled_from([Layout.PACKED, Layout.PREFIX_SHARED]))
def test_prompts_and_shared_responses_are_laid_out_once(pairs: list[TokenPair], layout: Layout) -> None:
    batch = scoring_batch(pairs, layout)
    prompts = {tuple(pair.prompt_ids) for pair in pairs}
    sequences = {
        (tuple(pair.prompt_ids), tuple(response)) for pair in pairs for response in (pair.chosen_ids, pair.rejected_ids)
    }
    tokens = sum(map(len, prompts)) + sum(len(response) for _, response in sequences)
    assert batch.num_tokens == tokens == int((batch.segment_RT >= 0).sum())
    real = batch.segment_RT >= 0
    visible = dense_mask(batch)[:, 0] & real[:, :, None]
    assert batch.num_attended == int(visible.sum())


def test_padded_rows_hold_one_distinct_sequence_each_and_count_positions_through() -> None:
    pairs = token_pairs()
    batch = padded_batch(pairs, multiple=1)
    assert batch.input_ids_RT.shape == (7, 16)
    assert torch.equal(batch.position_ids_RT, torch.arange(16).expand(7, 16))
    assert batch.longest_sequence == 16


def test_rows_of_trees_never_hold_a_position_beyond_the_longest_sequence() -> None:
    """A table of learned positions has no entry for the column of the last response."""
    for layout in (Layout.PREFIX_SHARED, Layout.PACKED):
        batch = scoring_batch(token_pairs(), layout)
        assert int(batch.position_ids_RT.max()) == batch.longest_sequence - 1


def test_packed_rows_are_a_multiple_of_the_block() -> None:
    assert packed_batch(token_pairs()).input_ids_RT.shape == (1, 128)


@pytest.mark.parametrize("make", [padded_batch, prefix_shared_batch])
def test_rows_have_few_different_widths(make: Callable[[list[TokenPair]], ScoringBatch]) -> None:
    """A kernel is compiled for each; the padding belongs to no segment and is not scored."""
    random = np.random.RandomState(0)
    for tokens in (1, 10, 31, 60, 61, 100):
        ids = token_ids(random, tokens)
        batch = make([TokenPair(prompt_ids=ids, chosen_ids=ids, rejected_ids=ids[:1])])
        width = batch.input_ids_RT.shape[1]
        assert width % 32 == 0
        assert int((batch.segment_RT[0] >= 0).sum()) > width - 32
        assert int((batch.segment_RT >= 0).sum()) == batch.num_tokens


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(3, 900), min_size=1, max_size=40), st.integers(0, 99))
def test_groups_share_rows_of_even_length_up_to_a_bound(lengths: list[int], seed: int) -> None:
    random = np.random.RandomState(seed)
    pairs = []
    for tokens in lengths:
        ids = token_ids(random, tokens)
        pairs.append(TokenPair(prompt_ids=ids[: tokens - 2], chosen_ids=ids[-2:-1], rejected_ids=ids[-1:]))
    batch = scoring_batch(pairs, Layout.PREFIX_SHARED)
    rows, width = batch.input_ids_RT.shape
    assert width < 2048 + 900 + 32
    fewest = -(-batch.num_tokens // 2048)
    # Longest first into the emptiest row leaves rows apart by no more than one group.
    assert rows * width <= batch.num_tokens + fewest * (max(lengths) + 32)


def test_short_pairs_share_one_row() -> None:
    random = np.random.RandomState(0)
    lengths = [(20, 5, 5), (5, 5, 5), (4, 5, 6), (10, 2, 3)]
    pairs = [
        TokenPair(prompt_ids=token_ids(random, p), chosen_ids=token_ids(random, c), rejected_ids=token_ids(random, r))
        for p, c, r in lengths
    ]
    assert prefix_shared_batch(pairs, multiple=1).input_ids_RT.shape == (1, 75)


def test_no_pairs_give_one_unscored_token_in_every_layout() -> None:
    for layout in Layout:
        batch = scoring_batch([], layout)
        assert (batch.num_pairs, batch.num_scored, batch.num_tokens) == (0, 0, 1)
        assert batch.input_ids_RT.shape == (1, 128 if layout is Layout.PACKED else 32)
        assert empty_batch(layout).tokens_S.shape == (0,)


def test_a_scored_first_token_is_a_programming_error() -> None:
    pair = TokenPair(
        *[],
        prompt_ids=np.ones(1, np.int32),
        chosen_ids=np.ones(1, np.int32),
        rejected_ids=np.ones(1, np.int32),
        scored_mask=np.ones(3, np.bool_),
    )
    with pytest.raises(AssertionError, match="first token of a prompt"):
        padded_batch([pair])

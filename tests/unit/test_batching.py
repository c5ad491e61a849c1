"""Plans of batches: every pair once, within the budget, longest first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.batching import plan_batches, split_group
from dpo_cache.pipeline.scoring.layouts import padded_batch
from dpo_cache.pipeline.scoring.prompt_group import group_by_prompt
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model_factory import token_ids


def some_pairs(seed: int, prompts: int, pairs_of_prompt: int) -> list[TokenPair]:
    random = np.random.RandomState(seed)
    pairs = []
    for _ in range(prompts):
        prompt, baseline = token_ids(random, random.randint(1, 30)), token_ids(random, random.randint(1, 20))
        for _ in range(random.randint(1, pairs_of_prompt + 1)):
            rejected = token_ids(random, random.randint(1, 20))
            pairs.append(TokenPair(prompt_ids=prompt, chosen_ids=baseline, rejected_ids=rejected))
    return [pairs[index] for index in random.permutation(len(pairs))]


def computed_tokens(pairs: Sequence[TokenPair], layout: Layout) -> int:
    """Tokens as the budget counts them."""
    if layout is Layout.PADDED:
        return padded_batch(pairs).input_ids_RT.numel()
    return sum(group.num_tokens for group in group_by_prompt(pairs))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 6), st.integers(20, 300), st.sampled_from(Layout))
def test_every_pair_is_planned_once_and_no_batch_exceeds_the_budget_without_need(
    seed: int, prompts: int, pairs_of_prompt: int, budget: int, layout: Layout
) -> None:
    pairs = some_pairs(seed, prompts, pairs_of_prompt)
    plan = plan_batches(pairs, layout, tokens_per_batch=budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(pairs)))
    for batch in plan:
        members = [pairs[index] for index in batch]
        assert len(batch) == 1 or computed_tokens(members, layout) <= budget


@pytest.mark.parametrize("layout", Layout)
def test_the_longest_row_comes_first(layout: Layout) -> None:
    pairs = some_pairs(1, prompts=20, pairs_of_prompt=3)
    plan = plan_batches(pairs, layout, tokens_per_batch=200)
    lengths = [
        max(
            group.longest_sequence if layout is Layout.PADDED else group.num_tokens
            for group in group_by_prompt([pairs[index] for index in batch])
        )
        for batch in plan
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_pairs_of_a_prompt_stay_together_and_their_shared_response_is_counted_once() -> None:
    pairs = some_pairs(2, prompts=1, pairs_of_prompt=6)
    [group] = group_by_prompt(pairs)
    assert len(group.responses) == len(pairs) + 1
    assert plan_batches(pairs, Layout.PACKED, tokens_per_batch=group.num_tokens) == [list(group.pairs)]


class CountedPairs(list[TokenPair]):
    """Pairs that count how often one of them is looked at."""

    def __init__(self, pairs: Iterable[TokenPair]) -> None:
        super().__init__(pairs)
        self.looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("layout", Layout)
def test_a_prompt_with_very_many_pairs_is_split_by_looking_at_each_pair_a_few_times(layout: Layout) -> None:
    """Each part takes pairs as long as the next one fits, without going through the part again for each."""
    prompt = np.arange(5, dtype=np.int32)
    responses = [np.full(3, number, dtype=np.int32) for number in range(801)]
    pairs = CountedPairs(
        TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        for chosen, rejected in pairwise(responses)
    )
    [group] = group_by_prompt(pairs)
    pairs.looks = 0
    parts = split_group(group, pairs, layout, tokens_per_batch=1024)
    assert 800 <= pairs.looks <= 4 * 800
    assert [index for part in parts for index in part.pairs] == list(range(800))
    for part, following in pairwise(parts):
        assert computed_tokens([pairs[index] for index in part.pairs], layout) <= 1024
        assert computed_tokens([pairs[index] for index in (*part.pairs, following.pairs[0])], layout) > 1024


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.PREFIX_SHARED])
def test_a_fill_below_the_budget_joins_less_and_splits_nothing(layout: Layout) -> None:
    pairs = some_pairs(5, prompts=30, pairs_of_prompt=5)
    plan = plan_batches(pairs, layout, tokens_per_batch=1000, fill_tokens=60)
    groups = [group_by_prompt([pairs[index] for index in batch]) for batch in plan]
    assert sum(map(len, groups)) == len(group_by_prompt(pairs))
    assert any(group.num_tokens > 60 for members in groups for group in members)
    assert all(len(members) == 1 or sum(group.num_tokens for group in members) <= 60 for members in groups)


def test_packing_needs_no_more_batches_than_the_tokens_do() -> None:
    pairs = some_pairs(3, prompts=400, pairs_of_prompt=1)
    plan = plan_batches(pairs, Layout.PACKED, tokens_per_batch=1000)
    assert len(plan) == math.ceil(sum(group.num_tokens for group in group_by_prompt(pairs)) / 1000)


def test_the_plan_depends_on_nothing_but_its_input() -> None:
    pairs = some_pairs(4, prompts=10, pairs_of_prompt=3)
    assert plan_batches(pairs, Layout.PACKED, tokens_per_batch=100) == plan_batches(
        pairs, Layout.PACKED, tokens_per_batch=100
    )
    assert plan_batches([], Layout.PACKED, tokens_per_batch=100) == []

"""Items into bins: each once, within the capacity."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cache.pipeline.scoring.bin_packing import best_fit, even_bins
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(10, 60))
def test_best_fit_packs_every_item_once_within_the_capacity(lengths: Sequence[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(len(members) == 1 or sum(lengths[item] for item in members) <= capacity for members in bins)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_even_bins_hold_every_item_once_and_differ_by_no_more_than_one(lengths: Sequence[int], num_bins: int) -> None:
    bins = even_bins(lengths, num_bins)
    assert len(bins) == num_bins
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in members) for members in bins]
    assert max(loads) - min(loads) <= max(lengths)

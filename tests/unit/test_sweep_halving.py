"""Successive halving: who goes on, and how far everyone is trained."""

from __future__ import annotations

import itertools
import math

import pytest
from dpo_cache.stages.sweep_halving import better_ones, rung_shares, rung_steps
from dpo_cache.stages.sweep_run import Score
from hypothesis import given
from hypothesis import strategies as st


def score(accuracy: float | None, margin: float | None) -> Score:
    return Score(accuracy=accuracy, margin=margin)


def test_eight_points_at_a_quarter_four_at_the_half_two_to_the_end() -> None:
    shares = rung_shares(3, 2.0)
    assert shares == [0.25, 0.5, 1.0]
    assert [rung_steps(share, 100) for share in shares] == [25, 50, 100]
    names = [f"p{number}" for number in range(8)]
    for left in (4, 2, 1):
        names = better_ones({name: score(None, float(name[1])) for name in names}, factor=2, by="margin")
        assert len(names) == left
    assert names == ["p7"]


def test_steps_of_a_rung_are_whole_and_at_least_one() -> None:
    assert [rung_steps(share, 9) for share in rung_shares(3, 3.0)] == [1, 3, 9]
    assert [rung_steps(share, 1) for share in rung_shares(3, 2.0)] == [1, 1, 1]


def test_the_figure_asked_for_decides_and_the_other_breaks_ties() -> None:
    scores = {"a": score(0.9, 1.0), "b": score(0.8, 3.0), "c": score(0.9, 2.0)}
    assert better_ones(scores, factor=3, by="margin") == ["b"]
    assert better_ones(scores, factor=3, by="accuracy") == ["c"]


def test_a_run_without_a_finite_figure_is_worse_than_any() -> None:
    assert better_ones({"nan": score(None, None), "bad": score(0.0, -9.0)}, factor=2, by="margin") == ["bad"]


@given(
    st.dictionaries(st.text(max_size=3), st.floats(-9, 9), min_size=1, max_size=20),
    st.floats(1.01, 10),
    st.sampled_from(["margin", "accuracy"]),
)
def test_no_one_who_goes_on_is_worse_than_one_who_is_given_up(
    figures: dict[str, float], factor: float, by: str
) -> None:
    scores = {name: score(figure, figure) for name, figure in figures.items()}
    kept = better_ones(scores, factor=factor, by=by)
    assert len(kept) == math.ceil(len(figures) / factor)
    assert kept == [name for name in figures if name in kept]
    given_up = [figure for name, figure in figures.items() if name not in kept]
    assert min(figures[name] for name in kept) >= max(given_up, default=-math.inf)


@pytest.mark.parametrize("rungs", [2, 3, 5])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_the_shares_rise_by_the_factor_and_end_with_the_whole(rungs: int, factor: float) -> None:
    shares = rung_shares(rungs, factor)
    assert shares[-1] == 1
    assert [after / before for before, after in itertools.pairwise(shares)] == pytest.approx([factor] * (rungs - 1))

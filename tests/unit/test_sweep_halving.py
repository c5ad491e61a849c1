"""Successive halving: who goes on, and how far everyone is trained."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from dpo_cache.stages.sweeping.sweep_grid import SweepPoint
from dpo_cache.stages.sweeping.sweep_halving import (
    better_ones,
    default_figure,
    given_up_on_a_tie,
    margins_compare,
    rung_shares,
    rung_steps,
    separations_compare,
)
from dpo_cache.stages.sweeping.sweep_run import Score
from dpo_cache.stages.training.train_config import TrainConfig
from hypothesis import given
from hypothesis import strategies as st


def score(accuracy: float | None, margin: float | None, separation: float | None = None) -> Score:
    return Score(accuracy=accuracy, margin=margin, separation=separation)


def points(*options: dict[str, Any]) -> list[SweepPoint]:
    return [
        SweepPoint(name=str(number), options={}, config=TrainConfig(cache=Path("c"), output=Path("o"), **given))
        for number, given in enumerate(options)
    ]


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


def test_a_tie_of_the_accuracy_is_broken_by_margin_over_beta_and_not_by_the_margin() -> None:
    scores = {"beta-20": score(0.9, 2.0, 0.1), "beta-2": score(0.9, 1.0, 0.5), "worse": score(0.8, 3.0, 9.0)}
    assert better_ones(scores, factor=3, by="accuracy") == ["beta-2"]
    assert better_ones(scores, factor=3, by="margin") == ["worse"]


def test_points_that_only_a_tie_break_gave_up_are_named() -> None:
    scores = {"a": score(0.9, 1.0, 0.1), "b": score(0.9, 1.0, 0.5), "c": score(0.8, 1.0, 0.9)}
    assert given_up_on_a_tie(scores, ["b"], by="accuracy") == ["a"]
    assert given_up_on_a_tie(scores, ["a", "b"], by="accuracy") == []


def test_points_of_other_betas_are_halved_by_accuracy_unless_somebody_says_otherwise() -> None:
    assert default_figure(points({"seed": 1}, {"seed": 2})) == "margin"
    assert default_figure(points({"beta": 2.0}, {"beta": 5.0})) == "accuracy"


def test_margins_compare_only_at_one_loss_and_beta() -> None:
    assert margins_compare(points({"beta": 5.0}, {"beta": 5.0, "seed": 1}, {"loss": "dpo_norm"}))
    assert not margins_compare(points({"beta": 5.0}, {"beta": 2.0}))
    assert not margins_compare(points({"loss": "dpo"}, {"loss": "hinge"}))
    assert not margins_compare(points({"loss": "dpo"}, {"loss": "dpo", "f_divergence": "js"}))


def test_margins_over_beta_compare_among_losses_on_sums_or_among_losses_on_averages() -> None:
    assert separations_compare(points({"beta": 5.0}, {"beta": 2.0}, {"loss": "ipo"}))
    assert not separations_compare(points({"loss": "dpo_norm"}, {"loss": "dpo"}))
    assert not separations_compare(points({"loss": "dpo"}, {"loss": "dpo", "ld_alpha": 0.5}))


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

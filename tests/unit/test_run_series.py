from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import pytest
from dpo_cache.pipeline.report.run_record import read_run
from dpo_cache.pipeline.report.run_series import CHARTS, series_of, thinned, training_seconds
from hypothesis import given
from hypothesis import strategies as st
from run_factory import STEPS_PER_EPOCH, step_seconds, write_run


def test_time_comes_from_pairs_done_and_pairs_a_second(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), name="run")
    seconds = accumulate(step_seconds(step) for step in range(1, STEPS_PER_EPOCH + 1))
    assert training_seconds(run) == pytest.approx(list(seconds))  # the last batch of the epoch is short


def test_an_evaluation_lies_where_the_update_before_it_does(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), name="run")
    training, held_out = series_of(run, CHARTS[0])
    assert held_out.steps == [0, 5, 10, 13]
    assert held_out.seconds == [0.0, *(training.seconds[step - 1] for step in (5, 10, 13))]


def test_without_a_config_there_is_no_time_and_the_curve_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluate_every=None)
    (folder / "config.json").unlink()
    (series,) = series_of(read_run(folder, name="run"), CHARTS[0])
    assert len(series.values) == STEPS_PER_EPOCH
    assert all(map(math.isnan, series.seconds))


@given(
    values=st.lists(st.one_of(st.floats(allow_nan=True), st.just(math.nan)), max_size=400),
    max_points=st.integers(min_value=6, max_value=50),
)
def test_a_thinned_curve_keeps_its_ends_its_lowest_and_its_highest(values: list[float], max_points: int) -> None:
    kept = thinned(values, max_points=max_points)
    assert kept == sorted(set(kept))
    assert len(kept) <= max_points
    finite = [value for value in values if math.isfinite(value)]
    shown = [values[place] for place in kept if math.isfinite(values[place])]
    if values:
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
    if finite:
        assert (min(shown), max(shown)) == (min(finite), max(finite))

"""A grid's file becomes points: crossed axes and listed ones, each checked and named before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.sweeping.sweep_grid import SweepGrid, point_name, read_grid, value_text
from dpo_cache.stages.training.train_config import TrainConfig
from hypothesis import given
from hypothesis import strategies as st

TOP = "cache: c\noutput: runs\n"


def grid_of(folder: Path, text: str) -> SweepGrid:
    path = folder / "grid.yaml"
    path.write_text(TOP + text, encoding="utf-8")
    return read_grid(path)


def test_axes_are_crossed_and_listed_points_stand_beside_them(tmp_path: Path) -> None:
    text = "train: {max-steps: 7}\ngrid: {beta: [2, 5], learning_rate: [1e-6, 5.0e-7]}\npoints: [{loss: simpo}]\n"
    grid = grid_of(tmp_path, text)
    assert [point.name for point in grid.points] == [
        "beta-2_learning-rate-1e-6",
        "beta-2_learning-rate-5e-7",
        "beta-5_learning-rate-1e-6",
        "beta-5_learning-rate-5e-7",
        "loss-simpo",
    ]
    # YAML reads 1e-6 as text: the options are numbers all the same, and the fixed ones hold for every point.
    assert grid.points[0].config == TrainConfig(
        cache=Path("c"), output=Path("runs") / grid.points[0].name, max_steps=7, beta=2.0, learning_rate=1e-6
    )
    assert grid.points[4].config.max_steps == 7


def test_any_kind_of_option_can_vary(tmp_path: Path) -> None:
    text = "train: {use-lora: true}\ngrid:\n  lora-target-modules: [[q_proj, v_proj], [o_proj]]\n"
    text += "  merge: [true, false]\n  seed: [1]\n  max-steps: [null]\n"
    configs = [point.config for point in grid_of(tmp_path, text).points]
    assert [config.lora_target_modules for config in configs] == [("q_proj", "v_proj")] * 2 + [("o_proj",)] * 2
    assert [config.merge for config in configs] == [True, False] * 2
    assert configs[0].max_steps is None
    assert configs[0].output == Path("runs/lora-target-modules-q_proj+v_proj_merge-true_max-steps-default_seed-1")


def test_a_point_keeps_its_name_when_axes_change_places_and_others_come(tmp_path: Path) -> None:
    before = grid_of(tmp_path, "grid: {beta: [2, 5], seed: [1]}\n").points
    after = grid_of(tmp_path, "points: [{loss: ipo}]\ngrid: {seed: [2, 1], beta: [5, 3, 2]}\n").points
    assert {point.name: point.config for point in before}.items() <= {p.name: p.config for p in after}.items()


def test_builds_are_of_the_sweeps_cache(tmp_path: Path) -> None:
    build = {"model": "m", "dataset": "a.jsonl"}
    held_out = {"model": "m", "dataset": ["b.jsonl", "d.jsonl"], "mixture": "held-out"}
    grid = grid_of(tmp_path, yaml.safe_dump({"build": [build, held_out], "points": [{}]}))
    assert grid.builds == (
        BuildConfig(model="m", dataset=("a.jsonl",), cache=Path("c")),
        BuildConfig(model="m", dataset=("b.jsonl", "d.jsonl"), mixture="held-out", cache=Path("c")),
    )
    assert [point.name for point in grid.points] == ["defaults"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {betta: [1]}", "grid: unknown option betta\n  next: did you mean beta?"),
        ("grid: {beta: [2, high]}", "grid: --beta is 'high'\n  expected: a number"),
        ("grid: {seed: [1.5]}", "grid: --seed is 1.5\n  expected: a whole number"),
        ("grid: {use-lora: [1]}", "grid: --use-lora is 1\n  expected: true or false"),
        ("points: [{beta: 5}, {seed: true}]", "point 2 of the list: --seed is True\n  expected: a whole number"),
        ("grid: {beta: [5, 0]}", "point beta-0: --beta is 0.0\n  expected: more than 0"),
        ("grid: {lora-rank: [8]}", "point lora-rank-8: --lora-rank has no effect without --use-lora"),
        ("grid: {beta: 5}", "the axis beta is 5\n  expected: a list of values"),
        ("grid: {cache: [a, b]}", "the axis cache cannot be set in a sweep"),
        ("train: {resume: latest}\npoints: [{}]", "train: resume cannot be set in a sweep"),
        ("points: [{beta: 5}, {beta: 5.0}]", "the point beta-5 is listed twice"),
        ("points: [{beta: 5}, {beta: 5, seed: 42}]", "the points beta-5 and beta-5_seed-42 are the same run"),
        ("beta: 5\npoints: [{}]", "unknown key beta at the top level"),
        ("build: {model: m}\npoints: [{}]", "build 1: dataset is missing"),
        ("build: {model: m, dataset: d, cache: e}\npoints: [{}]", "build 1 sets cache, which the sweep sets itself"),
        ("train: {beta: 5}", "has no points"),
        ("points: {beta: 5}", "points is {'beta': 5}\n  expected: a list of points"),
        ("points: [beta]", "point 1 of the list is 'beta'\n  expected: option names with values"),
        ("grid: {beta: [5], seed: [1], beta: [2]}", "grid.yaml: beta is given twice, in lines "),
        (": :\n - [", "is not YAML"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DpoCacheError) as refused:
        grid_of(tmp_path, text + "\n")
    assert message in str(refused.value)


def test_an_address_is_no_place_to_build_in(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("cache: s3://b/c\noutput: o\nbuild: {model: m, dataset: d}\npoints: [{}]\n")
    with pytest.raises(DpoCacheError, match="is an address, which is read-only"):
        read_grid(path)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(5.0, "5"), (0.1, "0.1"), (2.5, "2.5"), (1e-4, "1e-4"), (5e-7, "5e-7"), (2.5e-7, "2.5e-7"), (0.001, "0.001")],
        *[(1e6, "1e6"), (0.0, "0"), (123456.0, "123456"), (1 / 3, "0.3333333333333333")],
    ],
)
def test_numbers_are_written_as_people_write_them(number: float, text: str) -> None:
    assert value_text(number) == text


TEXT = st.text(min_size=1, max_size=40).filter(lambda text: "_" not in text)  # which is what joins options
NUMBER = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
OPTIONS = st.fixed_dictionaries({}, optional={"beta": NUMBER, "loss": TEXT, "model": TEXT, "seed": st.integers(0)})


@given(OPTIONS, OPTIONS)
def test_a_name_is_a_folder_name_and_tells_points_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    names = [point_name(options) for options in (one, other)]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}", name) for name in names)
    assert (names[0] == names[1]) == (list(one.items()) == list(other.items()))

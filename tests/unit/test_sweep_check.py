"""Whether all points can use one cache is known before anything starts, and an axis that cannot is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cache_factory import fill_cache, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.building.build_reference import resolve_reference
from dpo_cache.stages.sweeping.sweep_check import check_points, expected_cache
from dpo_cache.stages.sweeping.sweep_grid import read_grid
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_tiny_model(tmp_path_factory.mktemp("model"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, models: list[Path]) -> Path:
    """A cache of the first model with made-up values and a mixture `train`."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    config = BuildConfig(model=str(models[0]), dataset=("d",), cache=folder, dtype="float32")
    made = ReferenceCache.create(
        folder,
        CacheDescription(
            identity=resolve_reference(config).identity,
            recorded={"model": str(models[0])},
            vocabulary_sha256="b" * 64,
        ),
    )
    fill_cache(made, make_rows(8), shard_rows=8)
    return folder


def check(cache: Path, **file: Any) -> None:
    path = cache.parent / "grid.yaml"
    path.write_text(yaml.safe_dump({"cache": str(cache), "output": "o", **file}), encoding="utf-8")
    grid = read_grid(path)
    check_points(grid.points, expected_cache(grid))


def refusal(cache: Path, **file: Any) -> str:
    with pytest.raises(DpoCacheError) as refused:
        check(cache, **file)
    return str(refused.value)


def test_what_cannot_change_a_log_probability_may_vary(cache: Path, models: list[Path]) -> None:
    axes = {"beta": [1, 5], "loss": ["dpo", "ipo"], "seed": [1, 2], "learning-rate": [1e-6], "use-lora": [True, False]}
    check(cache, grid={**axes, "model": [None, str(models[0])], "dtype": ["float32", None]})


def test_an_axis_that_leaves_the_cache_is_named_with_each_value_and_what_to_do(cache: Path, models: list[Path]) -> None:
    message = refusal(cache, grid={"model": [str(models[0]), str(models[1])], "dtype": ["float32", "bfloat16"]})
    assert (
        "the cache cannot serve the axis dtype: at dtype = bfloat16, --dtype is bfloat16, and the cache was" in message
    )
    assert f"the cache cannot serve the axis model: at model = {models[1]}, the policy" in message
    assert f"model = {models[0]}" not in message
    assert "remove model from the points, and give each of its values its own sweep and cache" in message
    assert "--allow-other-policy" in message


def test_a_leave_that_is_meant_is_allowed(cache: Path, models: list[Path]) -> None:
    allowed = {"allow-other-policy": True, "allow-numerics-mismatch": True}
    check(cache, train=allowed, grid={"model": [str(models[1])], "dtype": ["bfloat16"]})


def test_an_option_of_all_points_is_no_axis(cache: Path) -> None:
    message = refusal(cache, train={"dtype": "bfloat16"}, points=[{"beta": 2}, {"beta": 5}])
    assert message.startswith("--dtype is bfloat16, and the cache was scored with float32")


def test_mixtures_have_to_be_there_or_to_be_built(cache: Path, models: list[Path]) -> None:
    message = refusal(cache, grid={"mixture": ["train", "tarin"]}, train={"eval-mixture": "held-out"})
    assert "the cache cannot serve the axis mixture: at mixture = tarin, the cache has no mixture 'tarin'" in message
    assert "the cache has no mixture 'held-out', and no build makes it (there are: train)" in message
    assert "add a build with `mixture: held-out`" in message
    build = {"model": str(models[0]), "dataset": "h", "mixture": "held-out"}
    check(cache, train={"eval-mixture": "held-out"}, points=[{}], build=build)


def test_before_the_first_build_the_reference_that_it_names_decides(tmp_path: Path, models: list[Path]) -> None:
    build = {"model": str(models[0]), "dataset": "d", "dtype": "float32"}
    check(tmp_path / "none", build=build, points=[{"model": str(models[0])}])
    message = refusal(tmp_path / "none", build=build, grid={"model": [str(models[1])], "dtype": ["bfloat16"]})
    assert "the axis dtype" in message
    assert "the axis model" in message
    assert not (tmp_path / "none").exists()
    assert "there is no cache in" in refusal(tmp_path / "none", points=[{}])


def test_builds_are_of_one_reference_and_one_for_each_mixture(cache: Path, models: list[Path]) -> None:
    build = {"model": str(models[1]), "dataset": "d"}
    message = refusal(cache, build=build, points=[{}])
    assert "the build of mixture train has another reference than the cache" in message
    assert "(weights_sha256)" in message
    assert "two builds make the same mixture" in refusal(cache, build=[build, build], points=[{}])

"""The settings on a report's page are those that a run resolved, whatever its options left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cache_factory import fill_cache, make_cache, make_rows
from dpo_cache.pipeline.report.run_record import RunRecord, read_run
from dpo_cache.pipeline.report.run_settings import UNKNOWN, settings_of_run, settings_table
from dpo_cache.stages.training.recipe import resolve_recipe
from dpo_cache.stages.training.train_config import TrainConfig
from run_factory import write_run


def record(folder: Path, **options: Any) -> RunRecord:
    """A run as one of these options would leave it, its numbers resolved by the trainer's own code."""
    cache = make_cache(folder / "cache")
    mixture = fill_cache(cache, make_rows(12), shard_rows=12)
    config = TrainConfig(cache=folder / "cache", output=folder / "run", **options)
    recipe = resolve_recipe(config, cache, mixture, num_ranks=2)
    resolved = json.loads(json.dumps(recipe.to_json()))
    settings = {"eval_mixture": config.eval_mixture, "mixture": config.mixture}
    return read_run(write_run(folder / "run", settings=settings, resolved=resolved), name="run")


def test_defaults_are_shown_as_the_numbers_they_are(tmp_path: Path) -> None:
    found = settings_of_run(record(tmp_path, max_steps=7))
    assert UNKNOWN not in found.values()
    expected = {
        **{"loss": "dpo_norm", "beta": "5", "peak learning rate": "5e-07", "pairs per update": "128", "updates": "7"},
        **{"schedule": "linear, 0 updates of warm-up", "trained": "all weights", "dtype": "float32", "ranks": "2"},
        **{"attention": "sdpa", "ZeRO stage": "3", "seed": "42", "evaluation mixture": "none"},
    }
    assert found.items() >= expected.items()


def test_sums_of_losses_and_adapters_are_told_with_their_numbers(tmp_path: Path) -> None:
    found = settings_of_run(record(tmp_path, loss="dpo=1,hinge:0.2=0.5", nll_coef=0.1, use_lora=True, lora_rank=8))
    assert found["loss"] == "1 × dpo + 0.5 × hinge, NLL coefficient 0.1"
    assert found["beta"] == "0.1, 0.2"
    assert found["trained"] == "a LoRA adapter, rank 8, alpha 16"


def test_runs_stand_side_by_side_and_one_without_a_config_leaves_its_column_empty(tmp_path: Path) -> None:
    bare = read_run(write_run(tmp_path / "bare", settings={}), name="bare")
    without = RunRecord(**{name: getattr(bare, name) for name in RunRecord.__slots__} | {"settings": {}})
    table = settings_table([record(tmp_path, max_steps=7), without])
    assert table is not None
    assert ("seed", ["42", UNKNOWN]) in table.rows
    assert settings_table([without]) is None


@pytest.mark.parametrize("loss", [None, 7, [], {"losses": [None, {"name": ["x"], "beta": "y"}]}, {"losses": 3}])
def test_whatever_a_config_says_of_the_loss_the_page_can_be_written(tmp_path: Path, loss: Any) -> None:
    run = read_run(write_run(tmp_path / "run", resolved={"loss": loss, "lora": "odd"}), name="run")
    assert settings_of_run(run)["trained"].startswith("a LoRA adapter")

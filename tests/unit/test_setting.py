"""A setting is declared once; flags, YAML keys, checks and child processes follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from dpo_cache.cli_options import config_options
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.build_config import BuildConfig
from dpo_cache.stages.setting import command_line_of, settings_of
from dpo_cache.stages.train_config import TrainConfig


def parsed(config_class: type, arguments: list[str]) -> object:
    """What the command line makes of ``arguments``."""
    made: list[object] = []

    @click.command()
    @config_options(config_class)
    def command(**values: object) -> None:
        made.append(config_class(**values))

    result = CliRunner().invoke(command, arguments, catch_exceptions=True)
    if isinstance(result.exception, DpoCacheError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return made[0]


def test_a_build_config_survives_the_way_through_a_command_line() -> None:
    config = BuildConfig(
        model="m",
        dataset=("a,amount=0.5", "b"),
        cache=Path("c"),
        max_seq_length=99,
        replace=True,
        num_workers=2,
    )
    assert parsed(BuildConfig, command_line_of(config)) == config


def test_a_train_config_survives_the_way_through_a_command_line() -> None:
    config = TrainConfig(
        cache=Path("c"),
        output=Path("o"),
        resume="latest",
        beta=0.1,
        learning_rate=1e-6,
        gradient_checkpointing=True,
    )
    assert parsed(TrainConfig, command_line_of(config)) == config


def test_a_bare_resume_means_the_latest_checkpoint() -> None:
    config = parsed(TrainConfig, ["--cache", "c", "--output", "o", "--resume", "--beta", "5"])
    assert isinstance(config, TrainConfig)
    assert (config.resume, config.beta) == ("latest", 5.0)


def test_flags_override_the_yaml_file(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cache: c\noutput: o\nbeta: 0.1\nlearning-rate: 1.0e-6\ngradient_checkpointing: true\n")
    config = parsed(TrainConfig, ["--config", str(recipe), "--beta", "5", "--no-gradient-checkpointing"])
    assert config == TrainConfig(cache=Path("c"), output=Path("o"), beta=5.0, learning_rate=1e-6)


def test_a_yaml_key_that_is_no_option_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cache: c\noutput: o\nbetta: 0.1\n")
    with pytest.raises(AssertionError, match="betta"):
        parsed(TrainConfig, ["--config", str(recipe)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zero-stage", "4"], "--zero-stage is 4"),
        (["--beta", "0"], "--beta is 0"),
        (
            ["--global-batch-size", "8", "--gradient-accumulation-steps", "2"],
            "--global-batch-size is given together",
        ),
        (["--eval-steps", "5"], "--eval-steps without --eval-mixture"),
        (["--keep-last-n-checkpoints", "0"], "--keep-last-n-checkpoints is 0"),
    ],
)
def test_a_value_out_of_bounds_names_its_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        parsed(TrainConfig, ["--cache", "c", "--output", "o", *arguments])


@pytest.mark.parametrize("config_class", [BuildConfig, TrainConfig])
def test_every_setting_has_a_line_of_help(config_class: type) -> None:
    assert all(declared.description.help for declared in settings_of(config_class))


@pytest.mark.parametrize(
    ("settings", "num_ranks", "expected"),
    [
        ({}, 8, 128),
        ({"global_batch_size": 32}, 8, 32),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}, 8, 128),
        ({"gradient_accumulation_steps": 4}, 32, 128),
    ],
)
def test_the_global_batch_is_a_number_of_pairs(settings: dict[str, Any], num_ranks: int, expected: int) -> None:
    config = TrainConfig(cache=Path("c"), output=Path("o"), **settings)
    assert config.resolved_global_batch_size(num_ranks) == expected

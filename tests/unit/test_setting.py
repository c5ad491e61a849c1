"""A setting is declared once; flags, YAML keys, checks and child processes follow from it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from dpo_cache.cli import dpo_cache, dpo_train
from dpo_cache.cli_options import config_options
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.interchange.import_config import ImportConfig
from dpo_cache.stages.setting import command_line_of, settings_of
from dpo_cache.stages.training.train_config import TrainConfig


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


def test_a_second_file_of_options_is_refused_because_it_would_replace_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("beta: 7")
    second.write_text("learning-rate: 1e-6")
    given = ["--cache", "c", "--output", str(tmp_path / "run"), "--config", str(first), "--config", str(second)]
    result = CliRunner().invoke(dpo_train, given)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert f"it is given 2 times ({first}, {second}), and one file would replace the other" in said


def test_a_path_in_a_file_may_look_like_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cache: 7\noutput: 20260101\nmodel: 13\n", "utf-8")
    config = parsed(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert config == TrainConfig(cache=Path("7"), output=Path("20260101"), model="13")


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
        (["--adam-beta2", "1"], "--adam-beta2 is 1"),
        (
            ["--global-batch-size", "8", "--gradient-accumulation-steps", "2"],
            "--global-batch-size is given together",
        ),
        (["--eval-steps", "5"], "--eval-steps has no effect without --eval-mixture"),
        (["--keep-last-n-checkpoints", "0"], "--keep-last-n-checkpoints is 0"),
    ],
)
def test_a_value_out_of_bounds_names_its_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        parsed(TrainConfig, ["--cache", "c", "--output", "o", *arguments])


@pytest.mark.parametrize("config_class", [BuildConfig, ImportConfig, TrainConfig])
def test_every_setting_has_help_and_stands_under_a_heading(config_class: type) -> None:
    for declared in settings_of(config_class):
        assert declared.description.help.endswith("."), declared.name
        assert "default" not in declared.description.help, declared.name  # that is said by `default_text`
        assert declared.description.group != "Options", declared.name
    groups = [declared.description.group for declared in settings_of(config_class)]
    assert len(list(itertools.groupby(groups))) == len(set(groups)), "options of one heading are declared together"


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


@pytest.mark.parametrize("missing", ["model", "dataset", "cache"])
def test_an_option_that_must_be_given_is_asked_for(missing: str) -> None:
    given = [f"--{name}=x" for name in ("model", "dataset", "cache") if name != missing]
    result = CliRunner().invoke(dpo_cache, ["build", *given, "--dry-run"])
    assert result.exit_code == 2
    assert f"Missing option '--{missing}'" in result.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("beta: [1, 2]", "--beta is [1, 2]"),
        ("beta: {a: 1}", "--beta is {'a': 1}"),
        ("beta: true", "--beta is True"),
        ("max-steps: 1.7", "--max-steps is 1.7"),
        ("use-lora: maybe", "--use-lora is 'maybe'"),
        ("output: [a, b]", "--output is ['a', 'b']"),
        ("config: other.yaml", "unknown option config"),
        ("betta: 3", "did you mean beta?"),
        ("max_steps: 1\nmax-steps: 2", "is given twice"),
        ("beta: 1\nseed: 2\nbeta: 3", "c.yaml: beta is given twice, in lines 1 and 3"),
        ("- a", "does not hold option names"),
        ("a: [1,", "is not YAML"),
    ],
)
def test_a_file_of_options_is_held_to_their_names_and_types(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(
        dpo_train, ["--cache", "c", "--output", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]
    )
    assert result.exit_code == 2, result.output
    assert complaint in result.stderr


def test_a_file_of_options_says_what_the_command_line_would(tmp_path: Path) -> None:
    lines = ["cache: hf://datasets/a/b", "output: o", "beta: null", "learning-rate: 1e-6", "resume: true"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "lora-target-modules: q_proj", "use-lora: true"]), "utf-8")
    config = parsed(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert config == TrainConfig(
        cache="hf://datasets/a/b",
        output=Path("o"),
        learning_rate=1e-6,
        resume="latest",
        use_lora=True,
        lora_target_modules=("q_proj",),
    )


def test_a_key_that_overrides_one_it_merges_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("<<: {cache: c, output: o, beta: 1}\nbeta: 3", "utf-8")
    config = parsed(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert isinstance(config, TrainConfig)
    assert config.beta == 3


def test_one_dataset_in_a_file_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dataset: pairs.jsonl", "utf-8")
    config = parsed(BuildConfig, ["--model", "m", "--cache", "c", "--config", str(tmp_path / "c.yaml")])
    assert config == BuildConfig(model="m", cache=Path("c"), dataset=("pairs.jsonl",))


@pytest.mark.parametrize("option", ["--num-train-epochs", "--learning-rate", "--weight-decay"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_has_to_be_finite(option: str, value: str) -> None:
    with pytest.raises(DpoCacheError, match=f"{option} is {value}"):
        parsed(TrainConfig, ["--cache", "c", "--output", "o", option, value])


@pytest.mark.parametrize("option", ["--cache", "--output"])
def test_an_empty_folder_name_is_not_taken_for_this_folder(option: str) -> None:
    given = {"--cache": "c", "--output": "o", option: ""}
    result = CliRunner().invoke(dpo_train, [word for pair in given.items() for word in pair])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


def test_a_home_folder_is_found_where_no_shell_has_looked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "c.yaml").write_text("cache: ~/cache\noutput: ~/run", "utf-8")
    config = parsed(TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert isinstance(config, TrainConfig)
    assert (config.cache, config.output) == (Path("/home/somebody/cache"), Path("/home/somebody/run"))

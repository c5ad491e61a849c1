"""What ``dpo-train`` refuses before any model is loaded, each with its message."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_factory import read_shard
from click.testing import CliRunner
from dpo_cache.cli import dpo_train
from dpo_cache.pipeline.cache import shard_writer
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.scoring.pair_scorer import SCORING_VERSION
from dpo_cache.stages.training import policy, recipe
from run_factory import write_run
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(policy, "load_causal_lm", refuse)


def refusal(cache: Path, output: Path, *more: str | Path) -> str:
    """The message with which ``dpo-train`` ends."""
    done = CliRunner().invoke(dpo_train, ["--cache", str(cache), "--output", str(output), *map(str, more)])
    assert done.exit_code == 1, done.exception
    assert done.stdout == ""
    return done.stderr[done.stderr.index("Error: ") :]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def a_shard(cache: Path) -> Path:
    return next((cache / "shards").glob("*.parquet"))


@pytest.mark.parametrize("how", [(), ("--resume",)])
def test_no_cache(tmp_path: Path, how: tuple[str, ...]) -> None:
    if how:
        write_run(tmp_path / "run")
    message = refusal(tmp_path / "none", tmp_path / "run", *how)
    assert message.startswith(f"Error: there is no cache in {tmp_path / 'none'}")
    assert "next: make one with: dpo-cache build" in message


def test_no_such_mixture(cache: Path, tmp_path: Path) -> None:
    message = refusal(cache, tmp_path / "run", "--mixture", "tarin")
    assert f"Error: {cache} has no mixture 'tarin'\n  expected: one of: train\n" in message


def test_a_plan_looks_for_the_held_out_pairs_too(cache: Path, tmp_path: Path) -> None:
    message = refusal(cache, tmp_path / "run", "--eval-mixture", "held-out", "--plan")
    assert f"Error: {cache} has no mixture 'held-out'" in message


def test_a_missing_shard_names_how_many_pairs_and_the_first(cache: Path, tmp_path: Path) -> None:
    a_shard(cache).unlink()
    message = refusal(cache, tmp_path / "run")
    assert "mixture train lacks 40 pairs (" in message
    assert "dpo-cache build" in message


def test_a_damaged_shard(cache: Path, tmp_path: Path) -> None:
    flip_a_bit(a_shard(cache))
    message = refusal(cache, tmp_path / "run")
    assert "mixture train lacks 40 pairs (" in message
    assert "damaged" in message


@pytest.mark.parametrize("name", ["cache.json", "mixtures/train.json"])
def test_a_damaged_pointer(cache: Path, tmp_path: Path, name: str) -> None:
    flip_a_bit(cache / name)
    message = refusal(cache, tmp_path / "run")
    assert f"{cache / name} is damaged" in message


def test_an_unknown_format_version(cache: Path, tmp_path: Path) -> None:
    from dpo_cache.pipeline.cache.canonical_json import read_sealed_json, write_sealed_json

    described = read_sealed_json(cache / "cache.json", max_bytes=1 << 20)
    write_sealed_json(cache / "cache.json", {**described, "format_version": 7}, temporary_folder=cache / "tmp")
    message = refusal(cache, tmp_path / "run")
    assert "cache.json has format version 7\n  expected: version 1" in message


def forge(path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Put a value in the place of a chosen logp, as a writer without our checks would; the key of that pair."""
    cache = ReferenceCache.open(path)
    mixture = cache.read_mixture("train")
    first, *rest = read_shard(a_shard(path))
    a_shard(path).unlink()
    monkeypatch.setattr(shard_writer, "refuse_unusable_values", lambda rows: None)
    cache.shards.write([replace(first, ref_chosen_logps=value), *rest])
    cache.write_mixture(
        "train",
        mixture.rows(),
        key_index=cache.shards.key_index(),
        tokenization=mixture.tokenization,
        sources=mixture.sources,
        dropped=mixture.dropped,
    )
    return first.key


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf, 3.5])
def test_a_value_that_no_reference_gives_names_count_and_key(
    cache: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = forge(cache, value, monkeypatch).hex()
    message = refusal(cache, tmp_path / "run")
    assert message.startswith("Error: 1 pairs of mixture train have reference values that are missing, not finite")
    assert key in message


def test_an_output_folder_that_is_not_empty(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    for resume in ([], ["--resume"]):  # there is no run to resume
        message = refusal(cache, tmp_path / "run", *resume)
        assert f"--output {tmp_path / 'run'} is not the folder of a run: it holds thesis.tex" in message
        assert "next: give another --output" in message
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_a_run_is_not_trained_again_over_itself(cache: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    message = refusal(cache, tmp_path / "run")
    assert f"--output {tmp_path / 'run'} is not empty: it holds metrics.jsonl" in message
    assert "next: add --resume to continue that run" in message


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_with_a_models_config_is_not_a_run_to_resume(
    resume: list[str], cache: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft").mkdir()
    config = (reference / "config.json").read_bytes()
    (tmp_path / "sft/config.json").write_bytes(config)
    message = refusal(cache, tmp_path / "sft", *resume)
    assert "is not the folder of a run: it holds config.json, and no config.json of a run" in message
    assert (tmp_path / "sft/config.json").read_bytes() == config


def test_an_output_folder_in_use_by_another_run(cache: Path, tmp_path: Path) -> None:
    import fcntl

    write_run(tmp_path / "run")  # it has begun: --resume would not help
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by process" in refusal(cache, tmp_path / "run")


def test_a_policy_that_is_not_the_reference(cache: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=3)
    message = refusal(cache, tmp_path / "run", "--model", other)
    assert "is not the reference of this cache (weights_sha256: cache " in message
    assert "--allow-other-policy" in message


def test_a_cache_that_another_version_of_the_scoring_code_made(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "SCORING_VERSION", SCORING_VERSION + 1)
    message = refusal(cache, tmp_path / "run", "--allow-other-policy", "--allow-numerics-mismatch")
    assert f"the cache was scored by version {SCORING_VERSION} of the scoring code\n" in message


def test_a_reference_overwritten_since(shared_cache: Path, reference: Path, tmp_path: Path) -> None:
    copied, model = tmp_path / "cache", tmp_path / "model"
    shutil.copytree(shared_cache, copied)
    shutil.copytree(reference, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "weights_sha256" in refusal(copied, tmp_path / "run", "--model", model)


@pytest.mark.parametrize("how", [(), ("--plan",)])
def test_a_cache_in_a_dtype_that_nothing_is_trained_in(
    cache: Path, tmp_path: Path, how: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "TRAINED_DTYPES", ("bfloat16",))  # as float16 is none
    message = refusal(cache, tmp_path / "run", *how)
    assert "the cache was scored in float32, in which nothing is trained here" in message
    assert "--dtype bfloat16 --allow-numerics-mismatch" in message


@pytest.mark.parametrize(("flag", "value"), [("--dtype", "bfloat16"), ("--attn-implementation", "eager")])
def test_other_numerics_than_the_caches(cache: Path, tmp_path: Path, flag: str, value: str) -> None:
    message = refusal(cache, tmp_path / "run", flag, value)
    assert f"{flag} is {value}, and the cache was scored with" in message
    assert "--allow-numerics-mismatch" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "ipo", "--label-smoothing", "0.1"], "--label-smoothing is not defined for --loss ipo"),
        (["--gamma-beta-ratio", "0.5"], "--gamma-beta-ratio has no effect without --loss simpo"),
        (["--use-lora", "--push-to-hub"], "--push-to-hub: an adapter names the model it belongs on"),
        (["--eval-mixture", "held-out"], "has no mixture 'held-out'"),
        (["--stop-after-steps", "1"], "--stop-after-steps is 1, but the run has 1 update\n"),
    ],
)
def test_options_that_would_be_ignored_or_mean_nothing(
    cache: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refusal(cache, tmp_path / "run", *options)


@pytest.fixture
def finished_checkpoint(cache: Path, tmp_path: Path) -> Callable[[], None]:
    """Write a checkpoint as another run would have left it, without running it."""

    def write() -> None:
        folder = write_run(tmp_path / "run", settings={"beta": 3.0}) / "checkpoints/step_3"
        (folder / "engine").mkdir(parents=True)
        state = {
            "step": 3,
            "num_ranks": 1,
            "zero_stage": 3,
            "run": {"seed": 7, "adam_beta2": 0.95, "loss": {"losses": [{"beta": 3.0}]}},
            "tracking_run_id": None,
        }
        (folder / "trainer_state.json").write_text(json.dumps(state))
        sizes = {"trainer_state.json": (folder / "trainer_state.json").stat().st_size}
        (folder / "COMPLETE").write_text(json.dumps({"files": sizes}))

    return write


def test_resuming_another_run_names_each_option_and_what_no_option_explains(
    cache: Path, tmp_path: Path, finished_checkpoint: Callable[[], None]
) -> None:
    finished_checkpoint()
    message = refusal(cache, tmp_path / "run", "--resume")
    assert "belongs to another run: " in message
    assert "seed was 7 and is 42" in message
    assert "adam_beta2 was 0.95 and is 0.999" in message
    assert "--beta was 3 and is left out" in message


def test_resuming_with_other_held_out_pairs_than_those_of_the_evaluations_so_far(
    cache: Path, tmp_path: Path, finished_checkpoint: Callable[[], None]
) -> None:
    finished_checkpoint()
    message = refusal(cache, tmp_path / "run", "--resume", "--eval-mixture", "train")
    assert f"--eval-mixture is train, but the evaluations in {tmp_path / 'run'} are of held-out" in message
    assert f"go on in another --output with --resume {tmp_path}/run/checkpoints/step_3" in message


def test_a_checkpoint_below_the_home_folder_is_found_where_no_shell_has_looked_for_it(
    cache: Path, tmp_path: Path, finished_checkpoint: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_checkpoint()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("resume: ~/run/checkpoints/step_3", "utf-8")
    message = refusal(cache, tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert f"{tmp_path}/run/checkpoints/step_3 belongs to another run" in message


def test_resuming_from_a_checkpoint_that_is_not_complete(
    cache: Path, tmp_path: Path, finished_checkpoint: Callable[[], None]
) -> None:
    finished_checkpoint()
    checkpoint = tmp_path / "run/checkpoints/step_3"
    (checkpoint / "COMPLETE").unlink()
    message = refusal(cache, tmp_path / "run", "--resume", checkpoint)
    assert "has no COMPLETE, so saving it was cut short" in message

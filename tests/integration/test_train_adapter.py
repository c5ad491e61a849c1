"""A LoRA policy from command to files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from commands import dpo_cache, dpo_train, fails, metrics, run
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer, write_tiny_model
from tiny_model_factory import tiny_model


def test_an_adapter_is_trained_partitioned_and_recomputing_and_saved_as_an_adapter(
    shared_cache: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    numbers = ("--max-steps", 4, "--global-batch-size", 8, "--learning-rate", 5e-2, "--warmup-ratio", 0)
    lora = ("--use-lora", "--lora-rank", 4, "--lora-target-modules", "q_proj", "--lora-target-modules", "down_proj")
    command = dpo_train("--cache", shared_cache, "--output", output, *numbers, *lora)
    report = run([*command, "--num-gpus", "2", "--gradient-checkpointing"])
    assert report["step0"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    losses = [line["train_loss"] for line in metrics(output)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.65
    weights = load_file(output / "model/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2  # layers, modules, matrices
    assert not any("k_proj" in name for name in weights)
    described = json.loads((output / "model/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(reference)
    AutoPeftModelForCausalLM.from_pretrained(output / "model")


def test_an_adapter_does_not_go_on_on_other_weights(shared_cache: Path, tmp_path: Path) -> None:
    """A checkpoint holds the adapter alone; the weights under it are read from where the command says."""
    other = write_tiny_model(tmp_path / "other", seed=1)
    numbers = ("--max-steps", 2, "--global-batch-size", 8, "--use-lora", "--lora-rank", 2, "--allow-other-policy")
    command = dpo_train("--cache", shared_cache, "--output", tmp_path / "run", *numbers)
    run([*command, "--stop-after-steps", "1"])
    message = fails([*command, "--model", str(other), "--resume"])
    assert f"belongs to another run: --model was left out and is {other}\n" in message


def test_an_adapter_that_cannot_be_merged_ends_a_run_with_merge_before_any_update(
    pairs_file: Path, tmp_path: Path
) -> None:
    base, cache, output = tmp_path / "base", tmp_path / "cache", tmp_path / "run"
    tokenizer = tiny_tokenizer()
    tiny_model("bamba", vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(base)
    tokenizer.save_pretrained(base)
    run(dpo_cache("build", "--model", base, "--dataset", pairs_file, "--cache", cache))
    convolutions = ("--use-lora", "--lora-rank", 80, "--lora-target-modules", "conv1d")
    numbers = ("--zero-stage", 0, "--global-batch-size", 8)
    command = dpo_train("--cache", cache, "--output", output, *convolutions, *numbers, "--merge")
    assert "--merge cannot add an adapter to the weights of model.layers.0.mamba.conv1d (Conv1d)" in fails(command)
    assert not (output / "step0.json").exists()

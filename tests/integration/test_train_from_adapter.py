"""A policy that starts from a reference with an adapter: the two are added up as they are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import dpo_cache, dpo_train, ended, fails, metrics, run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer, write_tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM


def write_base_and_adapter(base: Path, adapter: Path) -> Any:
    """A base in float32 and an adapter that changes it; gives the two as one model of peft."""
    write_tiny_model(base, hidden_size=64, intermediate_size=256)  # large enough for ZeRO-3 to cut it up
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        # Not so strong that merged weights and base plus adapter round apart on some processors.
        LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_rslora=True),
    )
    adapted.save_pretrained(adapter)
    return adapted


def test_a_policy_starts_at_base_plus_adapter_and_is_saved_as_one_model(pairs_file: Path, tmp_path: Path) -> None:
    base, adapter, cache, output = (tmp_path / name for name in ("base", "adapter", "cache", "run"))
    adapted = write_base_and_adapter(base, adapter)
    run(dpo_cache("build", "--model", base, "--adapter", adapter, "--dataset", pairs_file, "--cache", cache))

    lora_on_top = dpo_train("--cache", cache, "--output", tmp_path / "none", "--use-lora")
    assert "belongs on neither the base nor the adapter" in fails(lora_on_top)
    quantized = ("--use-qlora", "--merge", "--zero-stage", 2, "--allow-numerics-mismatch")
    quantized_below = dpo_train("--cache", cache, "--output", tmp_path / "none", *quantized)
    assert "--use-qlora cannot start at a reference with an adapter" in fails(quantized_below)
    base_alone = dpo_train("--cache", cache, "--output", tmp_path / "none", "--model", base)
    assert "is not the reference of this cache (adapter_sha256" in fails(base_alone)

    numbers = ("--max-steps", 2, "--global-batch-size", 8, "--learning-rate", 0.0, "--num-gpus", 2)
    report = run(dpo_train("--cache", cache, "--output", output, *numbers))
    assert report["step0"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert json.loads((output / "config.json").read_text())["resolved"]["policy_is_reference"]
    assert [line["train_loss"] for line in metrics(output)] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    # Merged, the weights round otherwise than base and adapter: a difference within that is a tie.
    assert [line["rewards/accuracy"] for line in metrics(output)] == [0.5, 0.5]
    saved = load_file(output / "model" / "model.safetensors")  # a learning rate of 0 has changed nothing
    expected = adapted.merge_and_unload().state_dict()
    assert saved.keys() == load_file(base / "model.safetensors").keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_trained_on_top_in_bfloat16_is_added_to_base_and_adapter(pairs_file: Path, tmp_path: Path) -> None:
    base, adapter, cache, output = (tmp_path / name for name in ("base", "adapter", "cache", "run"))
    adapted = write_base_and_adapter(base, adapter)
    reference = ("--model", base, "--adapter", adapter, "--dtype", "bfloat16")
    run(dpo_cache("build", *reference, "--dataset", pairs_file, "--cache", cache))
    numbers = ("--max-steps", 1, "--global-batch-size", 8, "--learning-rate", 0.0)
    run(dpo_train("--cache", cache, "--output", output, *numbers, "--use-lora", "--merge"))
    saved = load_file(output / "model" / "model.safetensors")  # a learning rate of 0 has changed nothing
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_policy_starts_at_a_mixture_of_experts_plus_an_adapter_on_its_experts(
    pairs_file: Path, tmp_path: Path
) -> None:
    base, adapter, cache, output = (tmp_path / name for name in ("base", "adapter", "cache", "run"))
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(adapter)

    run(dpo_cache("build", "--model", base, "--adapter", adapter, "--dataset", pairs_file, "--cache", cache))
    numbers = ("--max-steps", 1, "--global-batch-size", 8, "--learning-rate", 0.0, "--num-gpus", 2)
    done = ended(dpo_train("--cache", cache, "--output", output, *numbers, "--json"))  # partitioned, as is the default
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["step0"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert done.stderr.count("the loss that balances the model's experts is off") == 1
    saved = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    expected = adapted.merge_and_unload().state_dict()
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)

"""Adapters on mixtures of experts, whose experts lie in one weight: trained, saved, merged, and as a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora, merge_adapter, refuse_unmergeable
from dpo_cache.pipeline.training.tensor_headers import read_headers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_model_factory import tiny_model
from training_factory import (
    LORA,
    export_adapter_plainly,
    export_plainly,
    make_engine,
    policy_logits,
    random_pairs,
    train_steps,
)
from transformers import AutoModelForCausalLM

BATCHES = [random_pairs(4, seed=step) for step in range(2)]
IDS = torch.tensor([[5, 9, 3, 17, 60, 4, 33]])
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}


def expert_model(name: str) -> Any:
    """A tiny mixture of experts."""
    if name == "qwen3_moe":
        return tiny_model("olmoe", model_type=name, moe_intermediate_size=16)
    if name == "deepseek_v3":  # the router has a buffer that is saved
        return tiny_model("olmoe", model_type=name, moe_intermediate_size=16, **_LATENT, **_ROUTED)
    if name == "gpt_oss":  # its experts have their inputs first, and biases
        return tiny_model("mixtral", attention="eager", model_type=name)
    return tiny_model(name)


CASES = [
    ("mixtral", 0, "float32"),
    ("olmoe", 3, "float32"),
    ("qwen3_moe", 0, "float32"),
    ("deepseek_v3", 3, "float32"),
    ("mixtral", 3, "bfloat16"),
]


def train_and_save(folder: str, cases: list[tuple[str, int, str]]) -> list[Any]:
    logits = []
    for name, stage, dtype in cases:
        base, output = Path(folder) / name, Path(folder) / f"{name}-{stage}"
        engine = make_engine(
            Path(folder), zero_stage=stage, num_ranks=dist.get_world_size(), load_from=base, lora=LORA, dtype=dtype
        )
        train_steps(engine, BATCHES, learning_rate=2e-2, micro_steps=1)
        export_adapter_plainly(engine, output / "adapter", base=base)
        export_plainly(engine, output / "merged", base=base)
        logits.append(policy_logits(engine, IDS))
    return logits


def test_a_merged_mixture_of_experts_is_its_base_with_the_adapter_saved_alone(tmp_path: Path) -> None:
    for name in {name for name, _, _ in CASES}:
        expert_model(name).save_pretrained(tmp_path / name)
    logits, _ = run_ranks(train_and_save, str(tmp_path), CASES, num_ranks=2)
    for (name, stage, dtype), of_policy in zip(CASES, logits, strict=True):
        base, output = tmp_path / name, tmp_path / f"{name}-{stage}"
        assert read_headers(output / "merged") == read_headers(base)
        merged, loading = AutoModelForCausalLM.from_pretrained(output / "merged", output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        untrained = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            before, found = untrained(input_ids=IDS).logits, merged(input_ids=IDS).logits
            expected = PeftModel.from_pretrained(untrained, output / "adapter")(input_ids=IDS).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        if dtype == "float32":
            torch.testing.assert_close(found.flatten(), torch.tensor(of_policy), atol=2e-5, rtol=1e-4)
        assert (found - before).abs().max() > 0.1


def _adapted(name: str) -> Any:
    """A mixture of experts with an adapter that changes its experts, and its router where peft reaches it."""
    model = expert_model(name)
    experts = ["experts.gate_up_proj", "experts.down_proj"] if name == "gpt_oss" else None  # peft knows the others'
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules="all-linear", target_parameters=experts, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_loaded_adapter_is_added_to_all_weights_as_peft_adds_it(name: str) -> None:
    expected = _adapted(name).merge_and_unload().state_dict()
    untrained = expert_model(name).state_dict()
    merged = merge_adapter(_adapted(name)).state_dict()
    assert merged.keys() == expected.keys() == untrained.keys()
    for tensor_name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=1e-5, atol=1e-6)
    changed = {tensor_name for tensor_name in merged if not torch.equal(merged[tensor_name], untrained[tensor_name])}
    for part in ("o_proj.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert any(part in tensor_name for tensor_name in changed), part


def test_an_adapter_that_cannot_be_merged_is_refused_before_it_is_trained() -> None:
    settings = LoraSettings(rank=80, alpha=80.0, target_modules=("conv1d",), seed=0)
    with pytest.raises(DpoCacheError, match=r"--merge cannot add .*\.conv1d \(Conv1d\)") as refused:
        refuse_unmergeable(add_lora(tiny_model("bamba"), settings))
    assert "linear layers and the weights of experts" in str(refused.value)
    assert "leave --merge out" in str(refused.value)
    refuse_unmergeable(add_lora(tiny_model("bamba"), LORA))


def test_a_reference_with_an_adapter_that_cannot_be_added_is_refused() -> None:
    convolution = get_peft_model(tiny_model("bamba"), LoraConfig(r=80, target_modules=["conv1d"]))
    with pytest.raises(DpoCacheError, match=r"the reference's adapter is a LORA adapter on .*\.conv1d"):
        merge_adapter(convolution)
    dora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(DpoCacheError, match="the reference's adapter is a LORA adapter with use_dora"):
        merge_adapter(dora)

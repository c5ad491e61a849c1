"""Loading a reference: what is switched off, what is asserted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.layouts import padded_batch
from dpo_cache.pipeline.scoring.model_loading import (
    find_backbone,
    find_causal_lm,
    find_head,
    load_causal_lm,
    load_config,
    noise_of,
)
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from safetensors.torch import load_file, save_file
from tiny_model_factory import VOCABULARY, tiny_model, token_pairs
from transformers import AutoConfig, AutoModelForCausalLM

CPU = torch.device("cpu")


def saved(folder: Path, name: str = "llama", **changes: Any) -> Path:
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def load(path: Path, **changes: Any) -> Any:
    settings = {"dtype": torch.float32, "attention": "sdpa", "device": "cpu", **changes}
    return load_causal_lm(path, **settings)


def test_a_loaded_model_has_the_dtype_and_kernel_asked_for_and_is_ready_to_score(tmp_path: Path) -> None:
    model = load(saved(tmp_path), dtype=torch.bfloat16, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert not model.config.use_cache


def test_a_router_that_transformers_keeps_in_float32_is_scored_in_the_dtype_it_is_trained_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DeepSpeed trains every weight in one dtype."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model("ernie4_5_moe", **sizes, **experts, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, parameter in plain.named_parameters() if parameter.dtype == torch.float32}
    assert "model.layers.1.mlp.gate.weight" in kept
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {buffer.dtype for buffer in plain.buffers()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "brought to bfloat16: model.layers.*.mlp.gate.moe_statics" in caplog.text
    quantized = load(tmp_path, dtype=torch.bfloat16, quantization="nf4")
    assert {parameter.dtype for parameter in quantized.parameters()} == {torch.bfloat16, torch.uint8}


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_training_mode_is_as_deterministic_as_evaluation(tmp_path: Path, name: str, noise: dict[str, float]) -> None:
    folder = saved(tmp_path, name, **noise)
    assert noise.items() <= noise_of(load_config(folder)).items()
    model = load(folder)
    scorer = PairScorer(model)
    batch = padded_batch(token_pairs())
    expected = scorer(batch).token_logps_N
    assert not any(getattr(model.config, field) for field in noise)
    model.train()
    torch.testing.assert_close(scorer(batch).token_logps_N, expected, atol=1e-6, rtol=0)


def test_a_router_that_needs_its_jitter_in_evaluation_is_refused_and_taken_without(tmp_path: Path) -> None:
    """Without the jitter of its own config, Phi's mixture of experts gives other values than transformers does."""
    folder = saved(tmp_path, "mixtral", model_type="phimoe", router_jitter_noise=0.01)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        as_published = plain(input_ids=ids).logits
        for module in plain.modules():
            if hasattr(module, "router_jitter_noise"):
                module.router_jitter_noise = 0.0
        assert (plain(input_ids=ids).logits - as_published).abs().max() > 0.1
    with pytest.raises(DpoCacheError, match=r"router_jitter_noise of 0\.01 decides how experts are weighted"):
        load(folder)

    scorer = PairScorer(load(saved(tmp_path, "mixtral", model_type="phimoe", router_jitter_noise=0.0)))
    batch = padded_batch(token_pairs())
    expected = scorer(batch).token_logps_N
    torch.testing.assert_close(scorer.train()(batch).token_logps_N, expected, atol=1e-6, rtol=0)


def test_weights_that_the_checkpoint_lacks_are_an_error_not_random(tmp_path: Path) -> None:
    weights = load_file(saved(tmp_path) / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DpoCacheError, match=r"lacks 2 of the model's weights: lm_head.weight, model.layers.1.mlp"):
        load(tmp_path)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = load(saved(tmp_path, "qwen2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_does_not_keep_its_head_apart_is_refused() -> None:
    model = tiny_model("llama")
    model.base_model_prefix = "inside"
    with pytest.raises(DpoCacheError, match="LlamaForCausalLM has no backbone under its base_model_prefix 'inside'"):
        PairScorer(model)


def test_an_adapter_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DpoCacheError, match="holds an adapter, not a model") as error:
        load(tmp_path)
    assert f"--adapter {tmp_path}" in str(error.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match=f"no model can be read at {tmp_path}"):
        load(tmp_path)


def test_a_model_that_reads_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(DpoCacheError, match="gemma3 model, which reads more than text"):
        load_config(tmp_path)


def test_a_kernel_that_the_model_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match="cannot be loaded: Gemma2ForCausalLM does not support"):
        load(saved(tmp_path, "gemma2"))


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_a_kernel_of_gpus_is_refused_on_a_cpu_with_one_that_runs(tmp_path: Path, kernel: str) -> None:
    with pytest.raises(DpoCacheError, match=f"{kernel} runs on a GPU, and this is a cpu") as refusal:
        load_causal_lm(tmp_path, dtype=torch.float32, attention=kernel, device=CPU)
    assert "--attn-implementation sdpa" in str(refusal.value)


def test_a_lora_reference_scores_like_its_merged_weights(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    adapted = peft.get_peft_model(
        load(base), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")

    model = load(base, adapter=tmp_path / "adapter")
    batch = padded_batch(token_pairs())
    logps = PairScorer(model).train()(batch).chosen_logps_B
    assert find_causal_lm(model) is model.get_base_model()
    assert find_head(model) is find_causal_lm(model).lm_head
    assert find_backbone(model) is find_causal_lm(model).model
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert abs(logps - PairScorer(load(base))(batch).chosen_logps_B).max() > 0.1
    merged = PairScorer(adapted.merge_and_unload().eval())(batch).chosen_logps_B
    torch.testing.assert_close(logps, merged, atol=1e-4, rtol=1e-4)


def test_an_adapter_for_other_shapes_is_refused_with_its_first_mismatch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    wider = saved(tmp_path / "wider", vocab_size=VOCABULARY + 3)  # as after tokens were added
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(load(wider), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        DpoCacheError, match=r"does not fit the weights of its base: size mismatch for .*embed"
    ) as error:
        load(saved(tmp_path / "base"), adapter=tmp_path / "adapter")
    assert "merge_and_unload" in str(error.value)


def test_an_adapter_that_waits_for_its_invocation_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(load(base), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DpoCacheError, match="adapter is an activated LoRA, which works only from its invocation"):
        load(base, adapter=tmp_path / "adapter")

"""Operations counted, against sums written out and against torch's own counter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dpo_cache.pipeline.scoring.flops import ModelCost, forward_flops
from dpo_cache.pipeline.scoring.layouts import padded_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.shape_rounding import rounded_up
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora
from tiny_model_factory import tiny_model, token_pairs
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma4TextConfig


def test_a_llama_costs_its_matrices_its_visible_couples_and_its_scored_positions() -> None:
    cost = ModelCost.of_model(tiny_model("llama"))
    attention, mlp = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48
    assert cost == ModelCost(backbone_weights=2 * (attention + mlp), head_weights=97 * 32, attention_width=2 * 4 * 8)
    assert forward_flops(cost, num_tokens=10, num_attended=55, num_scored=3) == (
        2 * 10 * 2 * (attention + mlp) + 4 * 55 * 64 + 2 * 3 * 97 * 32
    )


def test_only_active_experts_count() -> None:
    cost = ModelCost.of_model(tiny_model("mixtral"))
    attention, router, experts = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 2 * 3 * 32 * 48
    assert cost.backbone_weights == 2 * (attention + router + experts)


def onednn_linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the product that float32 layers on a CPU use, which torch's counter does not know."""
    return 2 * math.prod(x) * weight[0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3", "phi"])
def test_torch_counts_the_same_once_padding_and_hidden_couples_are_added(name: str) -> None:
    model = tiny_model(name, attention="eager")
    batch = padded_batch(token_pairs())
    rows, width = batch.input_ids_RT.shape
    products = {torch.ops.mkldnn._linear_pointwise: onednn_linear_flops}
    with FlopCounterMode(display=False, custom_mapping=products) as counter, torch.no_grad():
        PairScorer(model)(batch)
    ours = forward_flops(
        ModelCost.of_model(model),
        num_tokens=rows * width,
        num_attended=rows * width**2,
        num_scored=rounded_up(batch.num_scored),
    )
    # Rotary embeddings multiply positions and frequencies as a matrix product.
    assert 0 <= counter.get_total_flops() - ours <= 0.02 * ours


def test_a_model_without_attention_has_a_cost_too() -> None:
    cost = ModelCost.of_model(tiny_model("mamba2"))
    assert cost.attention_width == 0
    assert cost.backbone_weights > 0


def test_frozen_weights_under_an_adapter_need_no_gradients_of_their_own() -> None:
    model = tiny_model("llama")
    assert ModelCost.of_model(model).backward_forwards == 2
    adapted = add_lora(model, LoraSettings(rank=2, alpha=2.0, target_modules=("q_proj",), seed=0))
    assert ModelCost.of_model(adapted).backward_forwards == 1


def test_layers_that_differ_in_their_heads_are_counted_one_by_one() -> None:
    config = Gemma4TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    assert ModelCost.of_model(AutoModelForCausalLM.from_config(config)).attention_width == 4 * 8 + 4 * 16

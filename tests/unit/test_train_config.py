"""Options that would be ignored are refused; defaults are resolved in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.training.train_config import TrainConfig


def config(**options: Any) -> TrainConfig:
    return TrainConfig(cache=Path("cache"), output=Path("run"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 8}, "--lora-rank has no effect without --use-lora"),
        ({"lora_alpha": 8.0}, "--lora-alpha has no effect without --use-lora"),
        ({"lora_target_modules": ("q_proj",)}, "--lora-target-modules has no effect without --use-lora"),
        ({"merge": True}, "--merge has no effect without --use-lora"),
        ({"load_balancing_weight": 0.1}, "--load-balancing-weight has no effect without --load-balancing-loss"),
        ({"hub_model_id": "lab/model"}, "--hub-model-id has no effect without --push-to-hub"),
        ({"hub_revision": "v1"}, "--hub-revision has no effect without --push-to-hub"),
        ({"hub_private": False}, "--no-hub-private has no effect without --push-to-hub"),
        ({"use_qlora": True}, "which cannot partition quantized weights"),
        ({"keep_best": "margin"}, "--keep-best has no effect without --eval-mixture"),
        (
            {"keep_best": "margin", "eval_mixture": "held-out", "loss": "simpo"},
            "--keep-best judges by rewards, and --loss simpo has none",
        ),
        ({"wandb_project": "mine"}, "--wandb-project has no effect without --with-tracking"),
        ({"wandb_entity": "lab"}, "--wandb-entity has no effect without --with-tracking"),
        ({"wandb_tags": ("beta",)}, "--wandb-tags has no effect without --with-tracking"),
        ({"model_revision": "v1"}, "--model-revision has no effect without --model"),
        ({"zero_stage": 0, "offload_optimizer": True}, "--offload-optimizer has no effect at --zero-stage 0"),
        ({"zero_stage": 2, "offload_parameters": True}, "--offload-parameters has no effect at --zero-stage 2"),
        ({"zero_stage": 2, "zero_hpz_partition_size": 2}, "--zero-hpz-partition-size has no effect at --zero-stage 2"),
        (
            {"gradient_checkpointing": True, "activation_memory_budget": 0.5},
            "--gradient-checkpointing and --activation-memory-budget are given together",
        ),
        ({"plan": True, "dry_run": True}, "--plan and --dry-run are given together"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        config(**options)


def test_one_number_says_how_many_layers_keep_their_activations() -> None:
    assert config().share_of_kept_activations == 1.0
    assert config(gradient_checkpointing=True).share_of_kept_activations == 0.0
    assert config(activation_memory_budget=0.25).share_of_kept_activations == 0.25
    assert config(activation_memory_budget=0.0).share_of_kept_activations == 0.0


def test_an_adapter_has_numbers_and_a_full_policy_has_none() -> None:
    assert config().resolved_lora() is None
    assert config(use_lora=True).resolved_lora() == {"rank": 64, "alpha": 16.0, "target_modules": ["all-linear"]}
    given = config(use_lora=True, lora_rank=8, lora_alpha=32.0, lora_target_modules=("q_proj", "v_proj"))
    assert given.resolved_lora() == {"rank": 8, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}
    quantized = config(use_qlora=True, zero_stage=2, lora_rank=8)
    numbers = {"rank": 8, "alpha": 16.0, "target_modules": ["all-linear"], "quantization": "nf4"}
    assert quantized.resolved_lora() == numbers
    assert quantized.saves_adapter
    assert not config(use_qlora=True, zero_stage=2, merge=True).saves_adapter

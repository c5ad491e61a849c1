"""Our settings in DeepSpeed's words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.deepspeed_config import EngineSettings, deepspeed_config

SETTINGS = EngineSettings(zero_stage=3, dtype="bfloat16", max_grad_norm=1.0, num_ranks=8, hidden_size=4096, on_gpu=True)


def _values(config: Any) -> list[Any]:
    if isinstance(config, dict):
        return [value for entry in config.values() for value in _values(entry)]
    return [config]


@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_left_to_deepspeeds_judgement(stage: int) -> None:
    config = deepspeed_config(replace(SETTINGS, zero_stage=stage))
    assert "auto" not in _values(config)
    # DeepSpeed's default for this one has changed between versions.
    assert config["gradient_clipping"] == 1.0
    assert config["train_batch_size"] == 8


def test_bfloat16_keeps_float32_masters_and_accumulates_in_float32() -> None:
    config = deepspeed_config(SETTINGS)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True, "bf16_master_weights_and_grads": False}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in deepspeed_config(replace(SETTINGS, dtype="float32"))


def test_offloading_and_hierarchical_partitioning() -> None:
    zero = deepspeed_config(
        replace(SETTINGS, offload_optimizer=True, offload_parameters=True, hierarchical_partition_size=4)
    )["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["zero_hpz_partition_size"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "--offload-optimizer has no effect at --zero-stage 0"),
        ({"zero_stage": 2, "offload_parameters": True}, "--offload-parameters has no effect at --zero-stage 2"),
        ({"zero_stage": 2, "hierarchical_partition_size": 8}, "has no effect at --zero-stage 2"),
        ({"hierarchical_partition_size": 3}, "--zero-hpz-partition-size is 3 on 8 ranks"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        replace(SETTINGS, **change)

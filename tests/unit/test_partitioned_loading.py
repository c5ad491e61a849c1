"""Reading a model's weights at ZeRO stage 3: no rank ever holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distributed_run import run_ranks
from dpo_cache.pipeline.scoring.model_loading import load_causal_lm
from dpo_cache.pipeline.training.deepspeed_config import EngineSettings, deepspeed_config, partitioned_loading
from peak_memory import PeakMemory
from training_factory import write_llama

MIB = 2**20


def growth_in_loading(folder: str) -> float:
    """MiB that a rank needs at most while it loads."""
    warm = Path(folder) / "warm"
    _load(warm)  # imports, thread pools and the like are not the model's
    with PeakMemory() as memory:
        model = _load(Path(folder) / "large")
    assert all(parameter.numel() == 0 for parameter in _large(model)), "whole weights are still here"
    return memory.growth


def _large(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.ds_numel > MIB]


def _load(folder: Path) -> torch.nn.Module:
    settings = EngineSettings(
        zero_stage=3, num_ranks=2, dtype="float32", max_grad_norm=1.0, hidden_size=1024, on_gpu=False
    )
    with partitioned_loading(deepspeed_config(settings)):
        return load_causal_lm(folder, dtype=torch.float32, attention="sdpa", device="cpu")


def test_two_ranks_hold_half_each_and_a_file_in_hand(tmp_path: Path) -> None:
    write_llama(tmp_path / "warm", layers=1, hidden_size=64)
    size = write_llama(tmp_path / "large", layers=5, hidden_size=1024) / MIB
    for growth in run_ranks(growth_in_loading, str(tmp_path), num_ranks=2):
        assert growth < size / 2 + 50

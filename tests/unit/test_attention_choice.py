"""Which attention kernel a model gets when nobody asks for one."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.attention_choice import resolve_attention
from tiny_model_factory import CONFIGS
from transformers import AutoConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
A100, RTX_4090, H200, B200, RTX_5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


def gpu(monkeypatch: pytest.MonkeyPatch, architecture: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: architecture)


@pytest.mark.parametrize(
    ("name", "kernel"), [("llama", "sdpa"), ("gemma2", "eager"), ("mamba2", "eager"), ("bamba", "sdpa")]
)
def test_a_cpu_takes_what_the_architecture_has(name: str, kernel: str) -> None:
    config = AutoConfig.for_model(**CONFIGS[name])
    assert resolve_attention(None, config, CPU) == kernel


@pytest.mark.parametrize(
    ("name", "head_size", "kernel"),
    [
        ("llama", 64, "flex_attention"),
        ("olmo3", 128, "flex_attention"),
        ("gemma3", 256, "flex_attention"),
        ("llama", 96, "sdpa"),
        ("llama", 8, "sdpa"),
        ("bamba", 64, "sdpa"),
        ("gemma2", 8, "flex_attention"),  # it has no sdpa, and eager attention holds the whole square of a row
    ],
)
def test_a_gpu_takes_flex_attention_where_the_model_surely_runs_it(
    name: str, head_size: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, H200)
    config = AutoConfig.for_model(**{**CONFIGS[name], "head_dim": head_size})
    assert resolve_attention(None, config, GPU) == kernel


def test_a_head_size_that_a_config_does_not_state_follows_from_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, H200)
    width = {"hidden_size": 256, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type="qwen2", **width)
    assert resolve_attention(None, config, GPU) == "flex_attention"


@pytest.mark.parametrize(
    ("architecture", "kernel"),
    [
        (A100, "flex_attention"),
        (RTX_4090, "sdpa"),
        (H200, "flex_attention"),
        (B200, "flex_attention"),
        (RTX_5090, "sdpa"),
    ],
)
def test_a_gpu_with_too_little_shared_memory_keeps_sdpa(
    architecture: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, architecture)
    config = AutoConfig.for_model(**{**CONFIGS["llama"], "head_dim": 128})
    assert resolve_attention(None, config, GPU) == kernel


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, H200)
    config = AutoConfig.for_model(**{**CONFIGS["llama"], "head_dim": 128})
    assert resolve_attention("sdpa", config, GPU) == "sdpa"
    assert resolve_attention("eager", config, CPU) == "eager"


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DpoCacheError, match="--attn-implementation fast is not known") as error:
        resolve_attention("fast", None, CPU)
    assert "sdpa, eager, flex_attention, flash_attention_2" in str(error.value)

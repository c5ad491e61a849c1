"""How many tokens a forward pass may begin with."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.stages.scoring.token_budget import CPU_TOKENS, LARGEST_START, SMALLEST_START, TokenBudget
from tiny_model_factory import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.mark.parametrize("gib", [1e-6, 40.0])
def test_the_budget_follows_the_free_memory_of_a_gpu(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(gib * 2**30), 80 * 2**30))
    budget = TokenBudget(None, device=torch.device("cuda"), model=tiny_model("llama"))
    assert budget.tokens == (LARGEST_START if gib > 1 else SMALLEST_START)


def test_the_widest_layer_counts_whatever_the_config_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 10_000
    widest = 8 * 32 + 4 * 48  # hidden size and feed-forward part of the tiny models
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2 * 4 * widest * tokens, 80 * 2**30))
    assert TokenBudget(None, device=torch.device("cuda"), model=tiny_model("llama")).tokens == tokens
    # MPT has no hidden_size, and only a ratio for its feed-forward part.
    mpt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mpt", vocab_size=97, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)
    )
    assert TokenBudget(None, device=torch.device("cuda"), model=mpt).tokens == tokens * widest // (8 * 32 + 4 * 128)


def test_a_request_and_a_cpu_ask_no_gpu() -> None:
    assert TokenBudget(77, device=torch.device("cuda"), model=tiny_model("llama")).tokens == 77
    assert TokenBudget(None, device=torch.device("cpu"), model=tiny_model("llama")).tokens == CPU_TOKENS

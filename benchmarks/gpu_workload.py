"""Models of real shapes with random weights, and pairs of realistic lengths, for ``benchmarks/gpu.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from dpo_cache.pipeline.cache.example_key import example_key
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.token_pair import TokenPair
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    },
    "3b": {
        **{"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    },
    "tiny": {
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    },
}


def random_model(shape: str, attention: str, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500_000.0, use_cache=False)
    config._attn_implementation = attention
    with torch.device(device), default_dtype(torch.bfloat16):
        return LlamaForCausalLM(config).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def synthetic_pairs(count: int, *, longest: int) -> list[TokenPair]:
    """Lengths as preference data for chat has them: a prompt of some 200 tokens, answers of some 350, long tails."""
    random = np.random.RandomState(0)
    vocabulary = min(shape["vocab_size"] for shape in SHAPES.values())

    def ids(tokens: int) -> Any:
        return random.randint(0, vocabulary, max(1, tokens)).astype(np.int32)

    pairs = []
    for _ in range(count):
        prompt = min(int(random.lognormal(5.3, 1.0)), longest // 2)
        answers = [min(int(random.lognormal(5.85, 0.7)), longest - prompt) for _ in range(2)]
        pairs.append(TokenPair(prompt_ids=ids(prompt), chosen_ids=ids(answers[0]), rejected_ids=ids(answers[1])))
    return pairs


def scored(pair: TokenPair) -> ScoredPair:
    chosen, rejected = -11.0 * pair.chosen_tokens, -11.0 * pair.rejected_tokens
    return ScoredPair(
        key=example_key(pair),
        pair=pair,
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
        ref_chosen_common_logps=chosen,
        ref_rejected_common_logps=rejected,
        chosen_tokens=pair.chosen_tokens,
        rejected_tokens=pair.rejected_tokens,
    )

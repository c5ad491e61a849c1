"""Tiny random models of every architecture we promise, and the plain truth to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dpo_cache.pipeline.data.token_pair import TokenPair
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Wide enough for a wrong mask to be seen: a narrow random model answers everything alike.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama"},
    "qwen2": {**_BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_BASE, "model_type": "qwen3"},
    "qwen3-sliding": {**_BASE, "model_type": "qwen3", "use_sliding_window": True, **_MIXED},
    "olmo2": {**_BASE, "model_type": "olmo2"},
    "olmo3": {**_BASE, "model_type": "olmo3", **_MIXED},
    "mistral": {**_BASE, "model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        **{**_BASE, "model_type": "gemma2", **_MIXED},
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3": {**_BASE, "model_type": "gemma3_text", **_MIXED, "query_pre_attn_scalar": 8},
    "mixtral": {**_BASE, "model_type": "mixtral", **_EXPERTS},
    "olmoe": {**_BASE, "model_type": "olmoe", **_EXPERTS},
    "granite": {**_BASE, "model_type": "granite", "logits_scaling": 4.0},
    "cohere": {**_BASE, "model_type": "cohere", "logit_scale": 0.25},
    "phi": {**_BASE, "model_type": "phi", "num_key_value_heads": 4},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
    },
    "mamba2": {
        **{"model_type": "mamba2", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
        **{"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
        **{"initializer_range": 0.3},
    },
    "falcon_h1": {**_BASE, "model_type": "falcon_h1", **_MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "bamba": {**_BASE, "model_type": "bamba", **_MAMBA, "attn_layer_indices": [1]},
}
DEFAULT_ATTENTION = {"gemma2": "eager", "mamba2": "eager"}


def tiny_model(name: str, *, attention: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random model, ready to score; biases and gains random too, so that none can be forgotten unseen."""
    config = AutoConfig.for_model(**{**CONFIGS[name], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention or DEFAULT_ATTENTION.get(name, "sdpa")
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(random: np.random.RandomState, tokens: int) -> Any:
    """Random ids, special ones included."""
    return random.randint(0, VOCABULARY, tokens).astype(np.int32)


def token_pairs(seed: int = 0) -> list[TokenPair]:
    """Mixed lengths, answers of one token, a response in several pairs, a pair twice, scored prompt tokens."""
    random = np.random.RandomState(seed)
    prompt, shared = token_ids(random, 7), token_ids(random, 6)
    masked = TokenPair(
        prompt_ids=prompt, chosen_ids=shared, rejected_ids=token_ids(random, 3), scored_mask=_mask(random, 16)
    )
    plain = TokenPair(prompt_ids=prompt, chosen_ids=token_ids(random, 9), rejected_ids=shared)
    return [
        masked,
        TokenPair(prompt_ids=token_ids(random, 1), chosen_ids=token_ids(random, 1), rejected_ids=token_ids(random, 5)),
        plain,
        TokenPair(prompt_ids=token_ids(random, 12), chosen_ids=token_ids(random, 2), rejected_ids=token_ids(random, 1)),
        plain,
    ]


def _mask(random: np.random.RandomState, tokens: int) -> Any:
    mask = random.rand(tokens) < 0.5
    mask[[0, 1, 7, 13]] = False, True, True, True
    return mask


def plain_side_logps(model: Any, pair: TokenPair, side: str) -> torch.Tensor:
    """Token logps of the scored tokens of one side, as a textbook would: one sequence, full logits, log-softmax."""
    response = pair.chosen_ids if side == "chosen" else pair.rejected_ids
    response_scored = pair.chosen_scored if side == "chosen" else pair.rejected_scored
    ids = torch.from_numpy(np.concatenate([pair.prompt_ids, response])).long()
    scored = torch.from_numpy(np.concatenate([pair.prompt_scored, response_scored]))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logps = torch.log_softmax(logits[:-1].float(), dim=-1).gather(1, ids[1:, None])[:, 0]
    return logps[scored[1:]]


def weighted_loss(chosen: Sequence[torch.Tensor], rejected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Something with another weight for every side, sums and squares both."""
    terms = [(number + 1) * side + 0.1 * side**2 for number, side in enumerate([*chosen, *rejected])]
    return torch.stack(terms).sum()

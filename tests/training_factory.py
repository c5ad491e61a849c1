"""Tiny policies and cached pairs for the tests of training, and plain PyTorch to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from dpo_cache.pipeline.cache.example_key import example_key
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.model_loading import find_causal_lm, load_causal_lm
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.deepspeed_config import EngineSettings, deepspeed_config, partitioned_loading
from dpo_cache.pipeline.training.expert_blocks import gather_expert_blocks_whole
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.model_export import export_adapter, export_model
from dpo_cache.pipeline.training.model_tokenizer import ModelTokenizer
from dpo_cache.pipeline.training.objective import Objective, resolve_objective
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HIDDEN = 64, 16
LAYOUT = Layout.PREFIX_SHARED


def tiny_policy(*, seed: int = 0, tied: bool = False, attention: str = "sdpa") -> LlamaForCausalLM:
    """A two-layer Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,  # logits far enough apart for a wrong value to show
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config)


def write_llama(folder: Path, *, layers: int, hidden_size: int) -> int:
    """A model for tests of memory; the size of its weights in bytes. No file is larger than 25 MB."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="25MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def random_pairs(count: int, *, seed: int = 0) -> list[ScoredPair]:
    """Pairs of random ids whose cached values are plausible and belong to no model."""
    random = np.random.default_rng(seed)

    def ids(shortest: int, longest: int) -> Any:
        return random.integers(1, VOCABULARY, random.integers(shortest, longest + 1), dtype=np.int32)

    pairs = [TokenPair(prompt_ids=ids(2, 12), chosen_ids=ids(2, 9), rejected_ids=ids(2, 9)) for _ in range(count)]
    return [scored_pair(pair, -4.0 * pair.chosen_tokens, -4.1 * pair.rejected_tokens) for pair in pairs]


def scored_pair(pair: TokenPair, chosen_logps: float, rejected_logps: float) -> ScoredPair:
    """A cache row with the given reference values."""
    return ScoredPair(
        key=example_key(pair),
        pair=pair,
        ref_chosen_logps=chosen_logps,
        ref_rejected_logps=rejected_logps,
        ref_chosen_common_logps=chosen_logps,
        ref_rejected_common_logps=rejected_logps,
        chosen_tokens=pair.chosen_tokens,
        rejected_tokens=pair.rejected_tokens,
    )


def make_engine(
    folder: Path,
    *,
    zero_stage: int,
    num_ranks: int,
    objective: Objective | None = None,
    dtype: str = "float32",
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.1,
    tied: bool = False,
    load_universal: bool = False,
    load_from: Path | None = None,
    lora: LoraSettings | None = None,
    quantization: str | None = None,
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    load_balancing_weight: float | None = None,
    **partitioning: Any,
) -> PolicyEngine:
    """An engine around the tiny policy, or around the model in a folder, partitioned while it is read."""
    config = deepspeed_config(
        EngineSettings(
            zero_stage=zero_stage,
            dtype=dtype,
            max_grad_norm=max_grad_norm,
            num_ranks=num_ranks,
            hidden_size=1,  # nothing is small enough to stay whole on every rank
            on_gpu=False,
            load_universal=load_universal,
            **partitioning,
        )
    )
    if load_from is None:
        policy: nn.Module = tiny_policy(tied=tied, attention=attention)
        for parameter in policy.parameters():  # and not the table of rotary frequencies, as in loading
            parameter.data = parameter.data.to(getattr(torch, dtype))
    else:
        with partitioned_loading(config):
            policy = load_causal_lm(
                load_from, dtype=getattr(torch, dtype), attention=attention, device="cpu", quantization=quantization
            )
    if lora is not None:
        policy = add_lora(policy, lora)
    if gradient_checkpointing:
        find_causal_lm(policy).gradient_checkpointing_enable({"use_reentrant": False})
    gather_expert_blocks_whole(policy)
    return PolicyEngine(
        PairScorer(policy, load_balancing=load_balancing_weight is not None),
        load_balancing_weight=load_balancing_weight or 0.0,
        config=config,
        objective=objective or resolve_objective("dpo_norm"),
        weight_decay=weight_decay,
        bad_batch_path=folder / "bad_batch.json",
    )


def export_plainly(engine: PolicyEngine, folder: Path, *, base: Path, tokenizer: ModelTokenizer | None = None) -> None:
    """Save a model that was trained from this checkpoint, with the checkpoint's own tokenizer or another one."""
    export_model(
        engine,
        folder,
        base_folder=base,
        base_adapter=None,
        tokenizer=tokenizer or ModelTokenizer(base_folder=base),
        trust_remote_code=False,
        card="",
    )


def export_adapter_plainly(engine: PolicyEngine, folder: Path, *, base: Path) -> None:
    """Save the adapter that was trained on this checkpoint, with the checkpoint's own tokenizer."""
    tokenizer = ModelTokenizer(base_folder=base)
    export_adapter(engine, folder, base=str(base), revision=None, tokenizer=tokenizer, card="")


def plain_side_logps(model: nn.Module, prompt_ids: Any, answer_ids: Any) -> Tensor:
    """The summed log-probability of an answer, one row, full logits, in the model's own dtype and float64."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, answer_ids]).astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    logps: Tensor = logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None])
    return logps.double().sum()


def plain_dpo_norm(model: nn.Module, row: ScoredPair, beta: float) -> Tensor:
    """The length-normalised DPO loss of one pair, written out."""
    chosen = plain_side_logps(model, row.pair.prompt_ids, row.pair.chosen_ids) - row.ref_chosen_logps
    rejected = plain_side_logps(model, row.pair.prompt_ids, row.pair.rejected_ids) - row.ref_rejected_logps
    margin = chosen / len(row.pair.chosen_ids) - rejected / len(row.pair.rejected_ids)
    return -torch.nn.functional.logsigmoid(beta * margin)


def plain_training(
    model: nn.Module, global_batches: Sequence[Sequence[ScoredPair]], *, learning_rate: float
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each global batch, by AdamW on what can be trained, with nothing of ours."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    figures = []
    for pairs in global_batches:
        optimizer.zero_grad()
        loss: Any = sum(plain_dpo_norm(model, row, beta=5.0) for row in pairs) / len(pairs)
        torch.autograd.backward(loss)
        figures.append((float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(trained, 1.0))))
        optimizer.step()
    return figures


def train_steps(
    engine: PolicyEngine, global_batches: Sequence[Sequence[ScoredPair]], *, learning_rate: float, micro_steps: int
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each global batch, its pairs dealt round robin to ranks and micro-steps."""
    figures = []
    layout = Layout.PACKED if engine.scorer.attention == "flex_attention" else LAYOUT
    for pairs in global_batches:
        loss = torch.zeros((), dtype=torch.float64)
        for micro_step in range(micro_steps):
            mine = pairs[engine.rank + engine.num_ranks * micro_step :: engine.num_ranks * micro_steps]
            scored = engine.micro_step(
                collate(mine, layout).to(engine.device),
                num_pairs=len(pairs),
                is_last=micro_step == micro_steps - 1,
            )
            loss += scored.outcomes.objective_B.sum() / len(pairs)
        torch.distributed.all_reduce(loss)
        figures.append((float(loss), engine.apply_update(learning_rate)))
    return figures


def trained_weights(engine: PolicyEngine) -> list[float]:
    """All numbers that are trained, on every rank alike; collective."""
    weights: list[float] = []
    for parameter in engine.parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights += parameter.detach().double().flatten().tolist()
    return weights


def policy_logits(engine: PolicyEngine, ids: Tensor) -> list[float]:
    """What the policy itself says; collective."""
    engine.deepspeed.eval()
    policy: Any = engine.scorer.model
    with torch.no_grad():
        logits: list[float] = policy(input_ids=ids).logits.flatten().tolist()
    engine.deepspeed.train()
    return logits


def assert_no_frozen_weight_in(checkpoint: Path) -> None:
    """A checkpoint of an adapter holds the adapter alone."""
    (states, *_) = sorted((checkpoint / "engine").glob("*model_states.pt"))
    saved = torch.load(states, weights_only=False)["module"]
    assert saved
    assert all("lora_" in name for name in saved), "frozen weights are in the checkpoint"


# ---- what the tests of adapters train, with and without quantized weights ----

LORA = LoraSettings(rank=4, alpha=8.0, target_modules=("all-linear",), seed=5)
BATCHES = [random_pairs(5, seed=step) for step in range(5)]
RATE = 2e-2
IDS = torch.tensor([[5, 9, 3, 17, 60]])
"""A sequence whose logits tell two models apart."""

"""Mixtures of experts on two partitioned ranks, their balancing loss included."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.training.expert_blocks import expert_blocks, refuse_load_balancing
from dpo_cache.pipeline.training.micro_batch import collate
from tiny_model_factory import tiny_model
from training_factory import LAYOUT, make_engine, plain_dpo_norm, random_pairs, train_steps
from transformers import AutoModelForCausalLM

MODELS = ("olmoe", "mixtral")
BATCHES = [random_pairs(5, seed=step) for step in range(3)] + [random_pairs(1, seed=3)]
"""The last one is short: one rank of two has no pair, hence nothing to balance."""
RATE, WEIGHT = 2e-3, 5.0  # a weight at which the auxiliary loss is most of the gradient


def train_partitioned(folder: str, cases: list[tuple[str, bool]]) -> list[Any]:
    results = []
    for name, checkpointing in cases:
        engine = make_engine(
            Path(folder),
            zero_stage=3,
            num_ranks=2,
            weight_decay=0.0,
            load_from=Path(folder) / name,
            load_balancing_weight=WEIGHT,
            gradient_checkpointing=checkpointing,
        )
        blocks = [module for module in engine.scorer.modules() if type(module) in expert_blocks(engine.scorer)]
        gathered_whole = [getattr(block, "_z3_leaf", False) for block in blocks]
        figures = train_steps(engine, BATCHES, learning_rate=RATE, micro_steps=1)
        aux_loss = engine.evaluate(collate(BATCHES[0], LAYOUT)).policy.aux_loss
        results.append((gathered_whole, figures, None if aux_loss is None else float(aux_loss)))
    return results


def _plain_training(folder: Path) -> list[tuple[float, float]]:
    """Each rank's pairs as one micro-batch; the preference loss one row at a time, the auxiliary loss by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    balanced = PairScorer(model, load_balancing=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    figures = []
    for pairs in BATCHES:
        optimizer.zero_grad()
        loss: Any = sum(plain_dpo_norm(model, row, beta=5.0) for row in pairs) / len(pairs)
        objective = loss
        for mine in (pairs[0::2], pairs[1::2]):
            aux_loss = balanced(collate(mine, LAYOUT).batch).aux_loss
            assert aux_loss is not None
            objective = objective + WEIGHT * aux_loss * len(mine) / len(pairs)
        torch.autograd.backward(objective)
        figures.append((float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        optimizer.step()
    return figures


def test_a_partitioned_mixture_of_experts_trains_as_plain_pytorch_with_its_balancing_loss(tmp_path: Path) -> None:
    for name in MODELS:
        tiny_model(name).save_pretrained(tmp_path / name)
    expected = {name: _plain_training(tmp_path / name) for name in MODELS}
    cases = [("olmoe", False), ("mixtral", False), ("mixtral", True)]
    for of_rank in run_ranks(train_partitioned, str(tmp_path), cases, num_ranks=2):
        for (name, _), (gathered_whole, figures, aux_loss) in zip(cases, of_rank, strict=True):
            assert gathered_whole == [True, True], name
            assert aux_loss > 0, name
            for step, (found, wanted) in enumerate(zip(figures, expected[name], strict=True)):
                assert found == pytest.approx(wanted, rel=2e-4), f"{name}, step {step}"


def test_there_is_nothing_to_balance_in_a_dense_model_or_where_the_router_is_not_shown() -> None:
    with pytest.raises(DpoCacheError, match="--load-balancing-loss means nothing to a llama model"):
        refuse_load_balancing(tiny_model("llama"))
    silent = tiny_model("mixtral")
    refuse_load_balancing(silent)
    silent.config = SimpleNamespace(model_type="mixtral")
    with pytest.raises(DpoCacheError, match="cannot be computed for mixtral models"):
        refuse_load_balancing(silent)

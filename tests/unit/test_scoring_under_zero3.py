"""Scoring on two real ranks that hold half of every weight each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.pipeline.scoring.flops import ModelCost
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.model_loading import load_causal_lm
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from tiny_model_factory import plain_side_logps, tiny_model, token_pairs
from transformers.integrations import HfDeepSpeedConfig

ZERO3 = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # Nothing is too small to be partitioned: a weight that is read without being gathered is empty.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def share_of_rank(rank: int) -> list[Any]:
    """All pairs on one rank, none on the other: as unequal as it gets."""
    return token_pairs() if rank == 0 else []


def score_and_differentiate(folders: list[str]) -> Any:
    return [_score_and_differentiate(folder) for folder in folders]


def _score_and_differentiate(folder: str) -> Any:
    deepspeed.init_distributed()
    zero_config = HfDeepSpeedConfig(ZERO3)  # alive while the model is read
    model = load_causal_lm(folder, dtype=torch.float32, attention="sdpa", device="cpu")
    del zero_config
    partitioned = all(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters())
    # Chunks of two tokens: the loop runs dozens of times on one rank and never on the other.
    scorer = PairScorer(model, head_chunk_tokens=2)
    optimizer = torch.optim.AdamW(scorer.parameters())
    engine = deepspeed.initialize(model=scorer, optimizer=optimizer, config=ZERO3)[0]
    engine.eval()
    layout = choose_layout(engine, device="cpu")

    batch = scoring_batch(share_of_rank(dist.get_rank()), layout)
    with torch.no_grad():
        scored = engine(batch)
    engine.train()
    logps = engine(batch)
    # DeepSpeed averages over ranks; the other rank's share is zero.
    engine.backward(2 * (logps.chosen_logps_B.sum() - logps.rejected_logps_B.sum()))
    gradients = {
        name: deepspeed.utils.safe_get_full_grad(parameter).flatten().tolist()
        for name, parameter in model.named_parameters()
    }
    cost = ModelCost.of_model(model)
    return {
        "partitioned": partitioned,
        "layout": layout,
        "chosen": scored.chosen_logps_B.tolist(),
        "rejected": scored.rejected_logps_B.tolist(),
        "gradients": gradients,
        "cost": [cost.backbone_weights, cost.head_weights, cost.attention_width],
    }


def test_a_partitioned_model_scores_and_differentiates_like_a_whole_one(tmp_path: Path) -> None:
    models = {name: tiny_model("llama", tie_word_embeddings=name == "tied") for name in ("tied", "untied")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    ranks = run_ranks(score_and_differentiate, [str(tmp_path / name) for name in models], num_ranks=2)
    for model, first, second in zip(models.values(), *ranks, strict=True):
        _compare_with_plain(model, first, second)


def _compare_with_plain(model: Any, first: Any, second: Any) -> None:
    chosen, rejected = (
        torch.stack([plain_side_logps(model, pair, side).sum() for pair in token_pairs()])
        for side in ("chosen", "rejected")
    )
    torch.autograd.backward(chosen.sum() - rejected.sum())
    assert first["partitioned"]
    assert first["layout"] == second["layout"] == Layout.PREFIX_SHARED
    torch.testing.assert_close(torch.tensor(first["chosen"]), chosen.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(first["rejected"]), rejected.detach(), atol=1e-4, rtol=1e-5)
    assert second["chosen"] == second["rejected"] == []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for rank in (first, second):
            ours = torch.tensor(rank["gradients"][name]).view_as(parameter)
            largest = parameter.grad.abs().max().clamp(min=1e-3)
            assert (ours - parameter.grad).abs().max() / largest < 1e-4, name
    cost = ModelCost.of_model(model)
    assert first["cost"] == [cost.backbone_weights, cost.head_weights, cost.attention_width]

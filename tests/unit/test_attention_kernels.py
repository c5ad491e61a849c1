"""What is set about torch's kernels before they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from distributed_run import run_ranks
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring import attention_masks
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import empty_batch, packed_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout, ScoringBatch
from tiny_model_factory import tiny_model, token_ids
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from training_factory import make_engine, random_pairs, train_steps
from transformers.integrations.flex_attention import WrappedFlexAttention

compile_fused = torch.compile
KERNELS_IN_TRAINING = [
    ("sdpa", 0, False),
    *(("flex_attention", zero_stage, recomputes) for zero_stage in (0, 3) for recomputes in (False, True)),
]
"""Kernel, ZeRO stage, and whether layers are recomputed."""


@pytest.fixture
def _compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with compiled_without_a_gpu(monkeypatch):
        yield


@contextmanager
def compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo sees the code that a GPU runs; what it makes of it runs unfused. A CPU has no fused backward pass."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of what other tests of this process compiled, or failed to
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_fused(function, backend="eager"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention_masks, "create_block_mask", compile_fused(create_block_mask, backend="eager"))
    yield
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = limits
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiled_without_a_gpu")
def test_flex_attention_stays_compiled_through_scoring_evaluation_and_training() -> None:
    """torch.compile keeps 8 variants unless told otherwise, and then attends over the whole square of a row.

    Layers with a window and layers without make the most variants.
    """
    scorer = PairScorer(tiny_model("olmo3", attention="flex_attention", max_position_embeddings=2048))
    choose_layout(scorer, device="cpu")
    batches = [_packed(tokens) for tokens in (500, 700, 1000)] + [empty_batch(Layout.PACKED), _packed(400)]

    def pass_over_all() -> None:
        for batch in batches:
            with torch.inference_mode():
                scorer(batch)
            with torch.no_grad():
                scorer(batch)
        scorer.train()
        for batch in batches:
            logps = scorer(batch)
            torch.autograd.backward(logps.chosen_logps_B.sum() + logps.rejected_logps_B.sum())

    pass_over_all()
    frames: Any = torch._dynamo.utils.counters["frames"]
    compiled = dict(frames)
    assert compiled["ok"] == compiled["total"]
    pass_over_all()
    assert dict(frames) == compiled, "shapes seen before are compiled anew"


def _packed(tokens: int) -> ScoringBatch:
    random = np.random.RandomState(tokens)
    parts = [token_ids(random, share) for share in (tokens // 2, tokens // 4, tokens // 4)]
    return packed_batch([TokenPair(prompt_ids=parts[0], chosen_ids=parts[1], rejected_ids=parts[2])])


def train_with_every_kernel(folder: str) -> list[Any]:
    """Loss and gradient norm of three updates; the last one leaves a rank without pairs."""
    global_batches = [random_pairs(7, seed=0), random_pairs(5, seed=1), random_pairs(1, seed=2)]
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch, compiled_without_a_gpu(monkeypatch):
        for attention, zero_stage, recomputes in KERNELS_IN_TRAINING:
            engine = make_engine(
                Path(folder),
                zero_stage=zero_stage,
                num_ranks=2,
                attention=attention,
                gradient_checkpointing=recomputes,
            )
            results.append(train_steps(engine, global_batches, learning_rate=2e-3, micro_steps=2))
    return results


def test_flex_attention_trains_in_deepspeeds_engine_as_sdpa_does(tmp_path: Path) -> None:
    """Partitioned and whole, with activations kept and recomputed."""
    for of_rank in run_ranks(train_with_every_kernel, str(tmp_path), num_ranks=2):
        sdpa, *flex = of_rank
        for kernel, figures in zip(KERNELS_IN_TRAINING[1:], flex, strict=True):
            for ours, theirs in zip(figures, sdpa, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), kernel


def test_cudnns_attention_is_not_chosen() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    PairScorer(tiny_model("llama"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]

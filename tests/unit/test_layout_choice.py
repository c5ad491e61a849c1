"""The self-test: what it refuses, and what it falls back to."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring import attention_masks, layout_choice, pair_scorer
from dpo_cache.pipeline.scoring.completion_head import LogitTransform
from dpo_cache.pipeline.scoring.layout_choice import choose_layout, tree_obstacle
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout, PairLogps, ScoringBatch, reduce_token_logps
from tiny_model_factory import tiny_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_disagreement(dtype: torch.dtype) -> None:
    assert choose_layout(PairScorer(tiny_model("llama").to(dtype)), device="cpu") is Layout.PREFIX_SHARED


def test_a_residual_stream_wider_than_the_head_is_narrowed_as_the_model_does() -> None:
    model = tiny_model("mamba2", residual_in_fp32=True).bfloat16()
    assert choose_layout(PairScorer(model), device="cpu") is Layout.PADDED


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba2", "take no position_ids"),
        ("falcon_h1", "carry a state"),
        ("bamba", "carry a state"),
    ],
)
def test_architectures_that_leak_are_told_by_their_config(name: str, reason: str) -> None:
    obstacle = tree_obstacle(PairScorer(tiny_model(name)))
    assert obstacle is not None
    assert reason in obstacle


def test_layers_of_an_unknown_kind_are_an_obstacle() -> None:
    scorer = PairScorer(tiny_model("llama"))
    scorer.windows = attention_masks.LayerWindows(layer_types=frozenset(["full_attention", "conv"]), window=None)
    assert tree_obstacle(scorer) == "llama has layers of conv"


def causal_only(batch: ScoringBatch, **_: Any) -> torch.Tensor | None:
    """A mask that forgets that responses must not see each other: what position_ids alone would give."""
    if batch.layout is Layout.PADDED:
        return None
    width = batch.input_ids_RT.shape[1]
    return torch.ones(width, width, dtype=torch.bool).tril().expand(len(batch.input_ids_RT), 1, -1, -1)


def test_a_wrong_mask_falls_back_to_the_padded_layout_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pair_scorer, "attention_mask", causal_only)
    with caplog.at_level(logging.WARNING):
        assert choose_layout(PairScorer(tiny_model("llama")), device="cpu") is Layout.PADDED
    assert "the prefix-shared layout and the model's own logits differ by" in caplog.text


def test_a_mask_that_does_not_fit_falls_back_to_the_layout_without_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_wide(batch: ScoringBatch, **_: Any) -> None:
        if batch.layout is not Layout.PADDED:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pair_scorer, "attention_mask", too_wide)
    with caplog.at_level(logging.WARNING):
        assert choose_layout(PairScorer(tiny_model("llama")), device="cpu") is Layout.PADDED
    assert "the prefix-shared layout does not fit" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(AsEngine(PairScorer(tiny_model("llama"))), device="cpu")


class AsEngine(torch.nn.Module):
    """A scorer as DeepSpeed wraps it."""

    def __init__(self, scorer: PairScorer) -> None:
        super().__init__()
        self.module = scorer

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)


def test_a_window_measured_in_columns_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_columns(batch: ScoringBatch, window: int | None = None) -> torch.Tensor:
        mask = right(batch)
        return mask if window is None else mask.triu(1 - window)

    right = attention_masks.dense_mask
    monkeypatch.setattr(attention_masks, "dense_mask", by_columns)
    assert choose_layout(PairScorer(tiny_model("mistral")), device="cpu") is Layout.PADDED


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "falcon_h1"])
def test_a_head_that_does_more_to_its_logits_than_we_know_is_refused(name: str) -> None:
    model = tiny_model(name)
    scorer = PairScorer(model)
    model.lm_head.transform = LogitTransform()
    with pytest.raises(DpoCacheError, match="does not reproduce the model's own values"):
        choose_layout(scorer, device="cpu")


def test_where_no_layout_is_right_no_cause_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models that choose the tokens they attend to among all of a row."""
    monkeypatch.setattr(layout_choice._SelfTest, "mean_difference", lambda *_: 0.0032)
    with pytest.raises(DpoCacheError) as refused:
        choose_layout(PairScorer(tiny_model("llama")), device="cpu")
    assert refused.value.found == (
        "llama models cannot be scored here: the padded layout does not reproduce the model's own values, which are "
        "0.0032 nats a token away"
    )
    assert refused.value.next_step == (
        "report the model: it may attend to something that a layout cannot express, or do something to its logits "
        "that this version does not know"
    )


def test_a_model_without_a_finite_value_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(DpoCacheError, match="no token a finite log-probability"):
        choose_layout(PairScorer(model), device="cpu")


def test_tokens_that_the_model_has_no_value_for_do_not_make_the_others_look_closer() -> None:
    """The layout is wrong by 1 nat a token; alone, the model has a value for the shorter sequence only."""

    def scorer(batch: ScoringBatch, *, through_full_logits: bool = False) -> PairLogps:
        is_alone = batch.num_pairs == 1
        value = 0.0 if not is_alone else 1.0 if batch.longest_sequence == 5 else float("nan")
        return reduce_token_logps(torch.full((batch.num_scored,), value), batch)

    ids = np.arange(9, dtype=np.int32)
    short, long = (
        TokenPair(prompt_ids=ids[:3], chosen_ids=ids[:length], rejected_ids=ids[-length:]) for length in (2, 9)
    )
    test = layout_choice._SelfTest(scorer=scorer, probe=[short, long], real=(), device="cpu", plain_row_multiple=1)
    assert test.mean_difference(Layout.PADDED) == 1.0

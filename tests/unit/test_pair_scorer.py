"""Both stages' scoring function against plain one-by-one scoring, for every promised architecture and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import empty_batch, scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout, PairLogps, token_logps_of_sides
from tiny_model_factory import CONFIGS, plain_side_logps, tiny_model, token_ids, token_pairs, weighted_loss
from torch.nn.attention.flex_attention import flex_attention
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations.flex_attention import WrappedFlexAttention

MIXTURES_OF_EXPERTS = ("mixtral", "olmoe")
RECURRENT = ("mamba2", "falcon_h1", "bamba")


def score(scorer: PairScorer, pairs: Sequence[TokenPair], layout: Layout) -> PairLogps:
    with torch.no_grad():
        logps: PairLogps = scorer(scoring_batch(pairs, layout))
    return logps


@pytest.mark.parametrize("name", CONFIGS)
def test_the_right_layout_is_chosen_and_equals_one_by_one_scoring(name: str) -> None:
    model = tiny_model(name)
    pairs = token_pairs()
    plain = {side: [plain_side_logps(model, pair, side).detach() for pair in pairs] for side in ("chosen", "rejected")}
    scorer = PairScorer(model, head_chunk_tokens=4)
    layout = choose_layout(scorer, device="cpu")
    assert layout is (Layout.PADDED if name in RECURRENT else Layout.PREFIX_SHARED)

    batch = scoring_batch(pairs, layout)
    logps = score(scorer, pairs, layout)
    sides = token_logps_of_sides(logps.token_logps_N, batch)
    torch.testing.assert_close(torch.cat(sides), torch.cat(plain["chosen"] + plain["rejected"]), atol=1e-5, rtol=1e-5)
    for side, sums, commons, counts in (
        ("chosen", logps.chosen_logps_B, logps.chosen_common_logps_B, logps.chosen_tokens_B),
        ("rejected", logps.rejected_logps_B, logps.rejected_common_logps_B, logps.rejected_tokens_B),
    ):
        common = [min(len(chosen), len(rejected)) for chosen, rejected in zip(*plain.values(), strict=True)]
        expected = [side_logps.double().sum() for side_logps in plain[side]]
        expected_common = [s.double()[:n].sum() for s, n in zip(plain[side], common, strict=True)]
        torch.testing.assert_close(sums, torch.stack(expected), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(commons, torch.stack(expected_common), atol=1e-4, rtol=1e-5)
        assert counts.tolist() == [len(side_logps) for side_logps in plain[side]]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_plain_scoring(name: str) -> None:
    model = tiny_model(name).double()
    if name in MIXTURES_OF_EXPERTS:
        model.set_experts_implementation("eager")  # the default one knows no float64
    pairs = token_pairs()
    sums = [[plain_side_logps(model, pair, side).sum() for pair in pairs] for side in ("chosen", "rejected")]
    torch.autograd.backward(weighted_loss(*sums))
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    scorer = PairScorer(model, head_chunk_tokens=4)
    layout = Layout.PADDED if name in RECURRENT else Layout.PREFIX_SHARED
    logps: PairLogps = scorer(scoring_batch(pairs, layout))
    torch.autograd.backward(weighted_loss(list(logps.chosen_logps_B), list(logps.rejected_logps_B)))
    for parameter_name, parameter in model.named_parameters():
        largest = plain[parameter_name].abs().max().clamp(min=1e-3)
        difference = (parameter.grad - plain[parameter_name]).abs().max() / largest
        assert difference < 1e-5, f"{parameter_name}: {difference}"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("layout", [Layout.PREFIX_SHARED, Layout.PACKED, Layout.PADDED])
def test_every_layout_gives_the_same_numbers_in_any_order_and_company(name: str, layout: Layout) -> None:
    pairs = token_pairs()
    scorer = PairScorer(tiny_model(name))
    expected = torch.stack([*score(scorer, pairs, Layout.PADDED)[:4]])

    together = torch.stack([*score(scorer, pairs, layout)[:4]])
    order = [3, 0, 4, 2, 1]
    shuffled = torch.stack([*score(scorer, [pairs[index] for index in order], layout)[:4]])
    alone = torch.cat([torch.stack([*score(scorer, [pair], layout)[:4]]) for pair in pairs], dim=1)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(shuffled, expected[:, order], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-5)


def test_swapping_chosen_and_rejected_swaps_their_values() -> None:
    pair = token_pairs()[2]
    swapped = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
    scorer = PairScorer(tiny_model("llama"))
    one, other = score(scorer, [pair], Layout.PREFIX_SHARED), score(scorer, [swapped], Layout.PREFIX_SHARED)
    torch.testing.assert_close(one.chosen_logps_B, other.rejected_logps_B, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.rejected_logps_B, other.chosen_logps_B, atol=1e-5, rtol=0)
    assert abs(one.chosen_logps_B - one.rejected_logps_B) > 1.0


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("layout", Layout)
def test_a_neighbour_changes_nothing(name: str, layout: Layout) -> None:
    """Same lengths, other ids: the other response of the pair, and the other pairs of its row."""
    pairs = token_pairs()
    scorer = PairScorer(tiny_model(name))
    before = score(scorer, pairs, layout)
    random = np.random.RandomState(9)
    others = [
        TokenPair(
            prompt_ids=token_ids(random, len(pair.prompt_ids)),
            chosen_ids=token_ids(random, len(pair.chosen_ids)),
            rejected_ids=token_ids(random, len(pair.rejected_ids)),
        )
        for pair in pairs
    ]
    neighbours_changed = score(scorer, [others[0], pairs[1], *others[2:]], layout)
    assert abs(neighbours_changed.chosen_logps_B[1] - before.chosen_logps_B[1]) < 1e-6
    other_side = replace(pairs[1], chosen_ids=others[1].chosen_ids)
    side_changed = score(scorer, [pairs[0], other_side, *pairs[2:]], layout)
    assert side_changed.chosen_logps_B[1] != before.chosen_logps_B[1]
    assert abs(side_changed.rejected_logps_B[1] - before.rejected_logps_B[1]) < 1e-5


def test_a_row_of_many_blocks_of_foreign_tokens_stays_finite_and_right() -> None:
    """Kernels go through the keys in blocks of up to 512; those of other groups are masked throughout."""
    random = np.random.RandomState(0)
    pairs = [
        TokenPair(
            prompt_ids=token_ids(random, 300), chosen_ids=token_ids(random, 200), rejected_ids=token_ids(random, 150)
        )
        for _ in range(3)
    ]
    scorer = PairScorer(tiny_model("llama", max_position_embeddings=512))
    packed, padded = score(scorer, pairs, Layout.PACKED), score(scorer, pairs, Layout.PADDED)
    torch.testing.assert_close(packed.token_logps_N, padded.token_logps_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_flex_attention_scores_the_packed_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfused: a CPU cannot always compile the fused kernel."""
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention)
    pairs = token_pairs()
    scorer = PairScorer(tiny_model(name, attention="flex_attention"))
    expected = score(PairScorer(tiny_model(name, attention="eager")), pairs, Layout.PADDED)
    ours = score(scorer, pairs, Layout.PACKED)
    torch.testing.assert_close(ours.chosen_logps_B, expected.chosen_logps_B, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.rejected_logps_B, expected.rejected_logps_B, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = tiny_model(name)
    scorer = PairScorer(model, load_balancing=name in MIXTURES_OF_EXPERTS)
    batch = scoring_batch(token_pairs(), Layout.PREFIX_SHARED)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logps = scorer(batch)
        torch.autograd.backward(logps.chosen_logps_B.sum() + (0 if logps.aux_loss is None else logps.aux_loss))
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", Layout)
def test_a_batch_without_pairs_gives_zero_gradients_everywhere(layout: Layout) -> None:
    model = tiny_model("llama")
    logps = PairScorer(model)(empty_batch(layout))
    assert logps.chosen_logps_B.shape == (0,)
    torch.autograd.backward(logps.chosen_logps_B.sum() + logps.rejected_logps_B.sum())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", MIXTURES_OF_EXPERTS)
@pytest.mark.parametrize("layout", Layout)
def test_the_load_balancing_loss_counts_real_tokens_only(name: str, layout: Layout) -> None:
    """One pair with the same answer twice is one sequence, whose loss the model itself can tell."""
    model = tiny_model(name)
    pair = token_pairs()[2]
    pair = replace(pair, rejected_ids=pair.chosen_ids)
    ids = torch.from_numpy(np.concatenate([pair.prompt_ids, pair.chosen_ids])).long()[None]
    expected = model(ids, output_router_logits=True).aux_loss

    logps = PairScorer(model, load_balancing=True)(scoring_batch([pair], layout))
    torch.testing.assert_close(logps.aux_loss, expected)
    torch.autograd.backward(logps.aux_loss)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert PairScorer(model)(scoring_batch([pair], layout)).aux_loss is None


def test_parameter_names_and_tying_survive() -> None:
    model = tiny_model("qwen2")
    names = list(model.state_dict())
    PairScorer(model)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sums_are_float64_over_fp32_token_logps_from_bf16_weights() -> None:
    logps = score(PairScorer(tiny_model("llama").bfloat16()), token_pairs(), Layout.PREFIX_SHARED)
    assert logps.token_logps_N.dtype is torch.float32
    assert all(sums.dtype is torch.float64 for sums in logps[:4])


def test_a_sequence_that_would_bend_its_neighbours_rotary_embedding_is_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    scorer = PairScorer(tiny_model("llama", max_position_embeddings=12, rope_parameters=rope))
    pairs = token_pairs()
    assert scorer.rope_limit == 12
    score(scorer, pairs[1:2], Layout.PADDED)
    with pytest.raises(DpoCacheError, match="a sequence of 16 tokens changes this model's rotary embedding"):
        score(scorer, pairs, Layout.PADDED)


@pytest.mark.parametrize(("name", "layout"), [("gpt2", Layout.PREFIX_SHARED), ("gptj", Layout.PADDED)])
def test_a_sequence_beyond_the_models_table_of_positions_is_refused(name: str, layout: Layout) -> None:
    pairs = token_pairs()
    scorer = PairScorer(small_table_model(name, positions=15))
    score(scorer, pairs[1:2], layout)
    with pytest.raises(DpoCacheError, match="a sequence of 16 tokens is longer than this model's table") as refused:
        score(scorer, pairs, layout)
    assert refused.value.next_step == "--max-seq-length 15"


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_padding_may_lie_beyond_the_table_of_positions(name: str) -> None:
    model, pairs = small_table_model(name, positions=16), token_pairs()
    batch = scoring_batch(pairs, Layout.PADDED)
    assert batch.input_ids_RT.shape[1] > 16
    logps = score(PairScorer(model), pairs, Layout.PADDED)
    plain = [plain_side_logps(model, pair, side).detach() for side in ("chosen", "rejected") for pair in pairs]
    sides = token_logps_of_sides(logps.token_logps_N, batch)
    torch.testing.assert_close(torch.cat(sides), torch.cat(plain), atol=1e-5, rtol=1e-5)


def small_table_model(name: str, *, positions: int) -> Any:
    """GPT-2 learns its positions, GPT-J keeps their sines."""
    if name == "gpt2":
        return tiny_model("gpt2", n_positions=positions)
    config = GPTJConfig(vocab_size=97, n_positions=positions, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    return GPTJForCausalLM._from_config(config, attn_implementation="eager").eval()

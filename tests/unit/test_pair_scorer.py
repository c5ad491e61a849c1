"""Both stages' scoring function against plain one-by-one scoring, for every promised architecture and layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.layout_choice import choose_layout
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout, PairLogps, token_logps_of_sides
from tiny_model_factory import CONFIGS, plain_side_logps, tiny_model, token_pairs

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


def weighted_loss(chosen: Sequence[torch.Tensor], rejected: Sequence[torch.Tensor]) -> torch.Tensor:
    """Something with another weight for every side, sums and squares both."""
    terms = [(number + 1) * side + 0.1 * side**2 for number, side in enumerate([*chosen, *rejected])]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_those_of_plain_scoring(name: str) -> None:
    model = tiny_model(name).double()
    if name in MIXTURES_OF_EXPERTS:
        model.set_experts_implementation("eager")  # the default one knows no float64
    pairs = token_pairs()
    weighted_loss(
        *([plain_side_logps(model, pair, side).sum() for pair in pairs] for side in ("chosen", "rejected"))
    ).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    scorer = PairScorer(model, head_chunk_tokens=4)
    layout = Layout.PADDED if name in RECURRENT else Layout.PREFIX_SHARED
    logps: PairLogps = scorer(scoring_batch(pairs, layout))
    weighted_loss(list(logps.chosen_logps_B), list(logps.rejected_logps_B)).backward()
    for parameter_name, parameter in model.named_parameters():
        largest = plain[parameter_name].abs().max().clamp(min=1e-3)
        difference = (parameter.grad - plain[parameter_name]).abs().max() / largest
        assert difference < 1e-5, f"{parameter_name}: {difference}"

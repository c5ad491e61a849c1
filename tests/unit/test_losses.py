"""Losses against numbers worked out by hand.

One pair throughout: πc = −10 over nc = 5 tokens, πr = −12 over nr = 4; fc = −11, fr = −10. So the log-ratios are
rc = 1 and rr = −2, hence Δ = 3; per token 0.2 and −0.5, hence avgΔ = 0.7; the policy's averages are −2 and −3. Of
the chosen answer the first four tokens have πc = −9 and fc = −9.5; the rejected one is the shorter.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_cache.pipeline.scoring.scoring_batch import PairLogps
from dpo_cache.pipeline.training.objective import F_DIVERGENCES, LOSS_TRAITS, Objective, resolve_objective
from dpo_cache.pipeline.training.pair_terms import ReferenceLogps, SortedPartners, pair_terms
from dpo_cache.pipeline.training.preference_loss import LOSSES, PairOutcomes, preference_loss
from dpo_cache.pipeline.training.sorted_partners import SortValues, match
from torch import Tensor


def _column(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).reshape(-1)


def _policy(
    chosen: Any, rejected: Any, *, chosen_tokens: Any = 5, rejected_tokens: Any = 4, chosen_common: Any = None
) -> PairLogps:
    """One pair, or several given as lists; the sums are leaves of the graph."""
    chosen_B, rejected_B = _column(chosen).requires_grad_(), _column(rejected).requires_grad_()
    return PairLogps(
        chosen_logps_B=chosen_B,
        rejected_logps_B=rejected_B,
        chosen_common_logps_B=chosen_B if chosen_common is None else _column(chosen_common),
        rejected_common_logps_B=rejected_B,
        chosen_tokens_B=torch.tensor(chosen_tokens).reshape(-1),
        rejected_tokens_B=torch.tensor(rejected_tokens).reshape(-1),
        token_logps_N=torch.empty(0),
        aux_loss=None,
    )


def _reference(chosen: Any, rejected: Any, *, chosen_common: Any = None) -> ReferenceLogps:
    return ReferenceLogps(
        chosen_logps_B=_column(chosen),
        rejected_logps_B=_column(rejected),
        chosen_common_logps_B=_column(chosen if chosen_common is None else chosen_common),
        rejected_common_logps_B=_column(rejected),
    )


POLICY = _policy(-10.0, -12.0, chosen_common=-9.0)
REFERENCE = _reference(-11.0, -10.0, chosen_common=-9.5)


def _partners(objective: Objective, policy: PairLogps, reference: ReferenceLogps) -> SortedPartners:
    """Partners when these pairs are the whole global batch."""
    terms = pair_terms(objective, policy, reference)
    columns = (terms.policy_margin_B, terms.reference_margin_B, terms.chosen_B, terms.rejected_B)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    matched = match([SortValues(bytes([number]), *row) for number, row in enumerate(rows)])
    margin_B, rejected_B, chosen_B = torch.tensor(matched, dtype=torch.float64).unbind(1)
    return SortedPartners(reference_margin_B=margin_B, rejected_B=rejected_B, chosen_B=chosen_B)


def _loss(text: str, policy: PairLogps = POLICY, reference: ReferenceLogps = REFERENCE, **numbers: Any) -> PairOutcomes:
    objective = resolve_objective(text, **numbers)
    return preference_loss(objective, policy, reference, _partners(objective, policy, reference))


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


Q = _sigmoid(0.3)  # 0.574443
M = _sigmoid(6)  # the modulation of discopop: 0.1 · 3 / 0.05


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("dpo", {}, -_log_sigmoid(0.3)),  # 0.554355
        ("dpo", {"label_smoothing": 0.2}, -0.8 * _log_sigmoid(0.3) - 0.2 * _log_sigmoid(-0.3)),
        ("dpo_norm", {"beta": 5.0}, -_log_sigmoid(3.5)),  # 5 · 0.7
        ("dpo_norm", {"beta": 2.0, "label_smoothing": 0.1}, -0.9 * _log_sigmoid(1.4) - 0.1 * _log_sigmoid(-1.4)),
        ("ipo", {}, (0.7 - 5) ** 2),  # 18.49
        ("ipo_sum", {}, (3 - 5) ** 2),  # 4
        ("hinge", {}, 0.7),
        ("hinge", {"beta": 0.5}, 0.0),
        ("robust", {"label_smoothing": 0.2}, (-0.8 * _log_sigmoid(0.3) + 0.2 * _log_sigmoid(-0.3)) / 0.6),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25}, -_log_sigmoid(2 * (1 - 0.25))),
        ("wpo", {}, math.exp(-5) * -_log_sigmoid(0.3)),
        (
            "exo_pair",
            {"label_smoothing": 0.01},
            Q * (math.log(Q) - math.log(0.99)) + (1 - Q) * (math.log(1 - Q) - math.log(0.01)),
        ),
        ("nca_pair", {}, -_log_sigmoid(0.1) - 0.5 * _log_sigmoid(-0.1) - 0.5 * _log_sigmoid(0.2)),
        ("bco_pair", {}, -_log_sigmoid(0.1) - _log_sigmoid(0.2)),
        ("sppo_hard", {}, (1 - 5) ** 2 + (-2 + 5) ** 2),  # 25
        ("apo_zero", {}, 1 - _sigmoid(0.1) + _sigmoid(-0.2)),
        ("apo_down", {}, _sigmoid(0.1) + 1 - _sigmoid(0.3)),
        ("discopop", {}, -_log_sigmoid(0.3) * (1 - M) + math.exp(-0.3) * M),
        # A batch of one pair has only itself to be sorted with: then both are dpo.
        ("aot", {}, -_log_sigmoid(0.3)),
        ("aot_unpaired", {"label_smoothing": 0.2}, -0.8 * _log_sigmoid(0.3) - 0.2 * _log_sigmoid(-0.3)),
        ("dpo=0.5,ipo_sum=2", {}, 0.5 * -_log_sigmoid(0.3) + 2 * 4),
        ("dpo:0.2,hinge=3", {}, -_log_sigmoid(0.6) + 3 * 0.7),
        ("dpo", {"nll_coef": 0.5}, -_log_sigmoid(0.3) + 0.5 * 2),  # the average per token is −2
        # u = e and e⁻²: f′ is 1 − 1/u, log(2u/(1+u)), (1 − u^−½)/½.
        ("dpo", {"f_divergence": "forward_kl"}, -_log_sigmoid(0.1 * (math.exp(2) - math.exp(-1)))),
        ("dpo", {"f_divergence": "js"}, -_log_sigmoid(0.1 * (_log_sigmoid(1) - _log_sigmoid(-2)))),
        ("dpo", {"f_divergence": "alpha", "f_alpha": 0.5}, -_log_sigmoid(0.1 * 2 * (math.e - math.exp(-0.5)))),
        # LD-DPO: rc is −9 + 9.5 over the first four tokens and 0.5 over the fifth.
        ("dpo", {"ld_alpha": 0.0}, -_log_sigmoid(0.1 * (0.5 + 2))),
        ("dpo", {"ld_alpha": 0.4}, -_log_sigmoid(0.1 * (0.5 + 0.4 * 0.5 + 2))),
    ],
)
def test_a_loss_is_its_equation(name: str, numbers: dict[str, Any], expected: float) -> None:
    outcome = _loss(name, **{"beta": 0.1, **numbers})
    assert outcome.objective_B.tolist() == pytest.approx([expected], rel=1e-12)


def test_every_loss_has_an_equation_traits_and_a_value_by_hand() -> None:
    assert list(LOSSES) == list(LOSS_TRAITS)
    (marked,) = test_a_loss_is_its_equation.pytestmark
    assert {case[0] for case in marked.args[1]} >= set(LOSSES)


def test_the_worked_figures_themselves() -> None:
    assert _loss("dpo").objective_B.item() == pytest.approx(0.5543552444685)
    assert _loss("dpo_norm").objective_B.item() == pytest.approx(0.02975041, 1e-6)
    assert _loss("apo_zero", beta=0.1).objective_B.item() == pytest.approx(0.925187, 1e-6)


# ---- sorting the global batch ----------------------------------------------------------------------------------

SEVERAL = (
    _policy([-10.0, -3.0, -8.0], [-12.0, -2.0, -4.5], chosen_tokens=[5, 2, 4], rejected_tokens=[4, 1, 2]),
    _reference([-11.0, -3.5, -7.0], [-10.0, -1.0, -5.0]),
)
"""πc − πr: 2, −1, −3.5; fc − fr: −1, −2.5, −2; rc: 1, 0.5, −1; rr: −2, −1, 0.5."""


def test_aot_matches_the_places_in_the_global_batch() -> None:
    # Sorted: policy −3.5, −1, 2 (pairs 3, 2, 1); reference −2.5, −2, −1.
    expected = [-_log_sigmoid(0.1 * delta) for delta in (2 + 1, -1 + 2, -3.5 + 2.5)]
    assert _loss("aot", *SEVERAL).objective_B.tolist() == pytest.approx(expected)


def test_aot_unpaired_matches_chosen_with_rejected() -> None:
    # Sorted: chosen −1, 0.5, 1 (pairs 3, 2, 1); rejected −2, −1, 0.5 (pairs 1, 2, 3).
    low, middle, high = (-_log_sigmoid(0.1 * delta) for delta in (-1 + 2, 0.5 + 1, 1 - 0.5))
    losses = _loss("aot_unpaired", *SEVERAL).objective_B
    assert losses.tolist() == pytest.approx([(high + low) / 2, middle, (low + high) / 2])
    assert losses.sum().item() == pytest.approx(low + middle + high)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_fixed_partners_give_the_gradient_of_the_sorted_batch(name: str) -> None:
    policy, reference = SEVERAL
    found = torch.autograd.grad(_loss(name, policy, reference).objective_B.sum(), policy[:2])
    if name == "aot":
        ours = (policy.chosen_logps_B - policy.rejected_logps_B).sort().values
        theirs = (reference.chosen_logps_B - reference.rejected_logps_B).sort().values
    else:
        ours = (policy.chosen_logps_B - reference.chosen_logps_B).sort().values
        theirs = (policy.rejected_logps_B - reference.rejected_logps_B).sort().values
    whole = -torch.nn.functional.logsigmoid(0.1 * (ours - theirs)).sum()
    for gradient, expected in zip(found, torch.autograd.grad(whole, policy[:2]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_equal_values_are_matched_alike_in_any_order() -> None:
    pairs = [SortValues(bytes([key]), 1.0, float(key), 0.0, float(-key)) for key in range(5)]
    matched = dict(zip(pairs, match(pairs), strict=True))
    assert dict(zip(pairs[::-1], match(pairs[::-1]), strict=True)) == matched


# ---- invariants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_the_sides_flips_the_margin(name: str) -> None:
    swapped = _loss(name, _policy(-12.0, -10.0, chosen_tokens=4, rejected_tokens=5), _reference(-10.0, -11.0))
    straight = _loss(name)
    # Held against rounding: avgΔ, or Δ over the mean length of the two sides.
    expected = 0.7 if LOSS_TRAITS[name].averages else 3 / 4.5
    assert swapped.margin_per_token_B.tolist() == (-straight.margin_per_token_B).tolist() == pytest.approx([-expected])
    if straight.chosen_rewards_B is None or swapped.rejected_rewards_B is None:
        assert name == "simpo"
    else:
        assert straight.chosen_rewards_B.tolist() == swapped.rejected_rewards_B.tolist()


@pytest.mark.parametrize("name", [name for name, traits in LOSS_TRAITS.items() if not traits.sorts_global_batch])
def test_the_sum_over_pairs_is_the_sum_of_single_pairs(name: str) -> None:
    """A pair's loss must not depend on its neighbours."""
    policy, reference = SEVERAL
    alone = [
        _loss(
            name,
            PairLogps(*(value[pair : pair + 1] if value is not None else None for value in policy)),  # type: ignore[arg-type]
            _reference(reference.chosen_logps_B[pair].item(), reference.rejected_logps_B[pair].item()),
        ).objective_B.item()
        for pair in range(3)
    ]
    assert _loss(name, policy, reference).objective_B.tolist() == pytest.approx(alone)


def test_rewards_and_logps_are_in_the_unit_of_the_loss() -> None:
    sums, averages = _loss("dpo,dpo_norm", beta=0.1), _loss("dpo_norm,dpo", beta=5.0)
    assert sums.chosen_rewards_B is not None
    assert averages.chosen_rewards_B is not None
    assert averages.rejected_rewards_B is not None
    assert sums.chosen_rewards_B.tolist() == pytest.approx([0.1 * 1])
    assert sums.chosen_logps_B.tolist() == pytest.approx([-10.0])
    assert averages.chosen_rewards_B.tolist() == pytest.approx([5 * 0.2])
    assert averages.rejected_rewards_B.tolist() == pytest.approx([5 * -0.5])
    assert averages.chosen_logps_B.tolist() == pytest.approx([-2.0])
    assert averages.rejected_logps_B.tolist() == pytest.approx([-3.0])


def test_rewards_are_those_the_loss_compares() -> None:
    divergent = _loss("dpo", beta=0.1, f_divergence="forward_kl")
    desensitised = _loss("dpo", beta=0.1, ld_alpha=0.0)
    assert divergent.chosen_rewards_B is not None
    assert desensitised.chosen_rewards_B is not None
    assert divergent.chosen_rewards_B.tolist() == pytest.approx([0.1 * (1 - math.exp(-1))])
    assert desensitised.chosen_rewards_B.tolist() == pytest.approx([0.1 * 0.5])
    assert desensitised.chosen_logps_B.tolist() == [-10.0]  # the log-probability is of the whole answer all the same


def test_a_loss_without_reference_has_no_rewards() -> None:
    assert _loss("simpo").chosen_rewards_B is None
    assert _loss("simpo").rejected_rewards_B is None


def test_wpo_weights_pass_no_gradient() -> None:
    policy = _policy(-10.0, -12.0)
    torch.autograd.backward(_loss("wpo", policy, beta=0.1).objective_B)
    # d/dπc of w·(−log σ(0.1·Δ)) with w = e⁻⁵ held: −w · 0.1 · σ(−0.3)
    assert policy.chosen_logps_B.grad is not None
    assert policy.chosen_logps_B.grad.tolist() == pytest.approx([-math.exp(-5) * 0.1 / (1 + math.exp(0.3))])


def test_wpo_weights_are_at_most_one() -> None:
    likely = _policy(5.0, 4.0)  # no log-probabilities, but the bound must hold
    assert _loss("wpo", likely, _reference(5.0, 4.0)).objective_B.tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", [-3e4, 3e4])
def test_values_and_gradients_stay_finite_far_from_the_reference(name: str, distance: float) -> None:
    for divergence in F_DIVERGENCES if LOSS_TRAITS[name].takes_f_divergence else ("reverse_kl",):
        policy = _policy(-3e4 + distance, -3e4 - distance)
        outcome = _loss(name, policy, _reference(-3e4, -3e4), f_divergence=divergence)
        for value in (outcome.objective_B, *torch.autograd.grad(outcome.objective_B.sum(), policy[:2])):
            assert torch.isfinite(value.float()).all(), (divergence, value)


# ---- against TRL -----------------------------------------------------------------------------------------------

TRL_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"} | {
    name: name for name in LOSSES if name not in ("dpo", "dpo_norm", "ipo_sum", "simpo", "wpo")
}
"""What TRL calls these losses. It has no summed ipo, no simpo here, and weights wpo otherwise."""


def test_values_and_gradients_are_those_of_trl() -> None:
    """The same pairs through ``DPOTrainer._compute_loss``, run by an interpreter that has TRL."""
    interpreter = os.environ.get("DPO_CACHE_TRL_PYTHON")
    if not interpreter:
        pytest.skip("DPO_CACHE_TRL_PYTHON does not name an interpreter with TRL")
    random = torch.Generator().manual_seed(3)
    lengths = [(5, 4), (2, 3), (6, 6), (1, 4)]
    pairs = [[(-3 * torch.rand(2, tokens, generator=random)).tolist() for tokens in of_pair] for of_pair in lengths]
    cases: list[dict[str, Any]] = [{"loss": name} for name in TRL_NAMES]
    cases += [{"loss": name, "ld_alpha": 0.3} for name in ("dpo", "hinge", "bco_pair", "aot")]
    cases += [{"loss": "dpo", "f_divergence": divergence} for divergence in F_DIVERGENCES]
    cases += [{"loss": "hinge", "f_divergence": "alpha", "f_alpha": 0.8}]
    cases += [{"loss": name, "label_smoothing": 0.2} for name in ("robust", "exo_pair", "aot", "aot_unpaired")]
    cases += [{"loss": "dpo=1.0,ipo=0.3"}]
    request = {"pairs": pairs, "cases": [_as_trl_says(case) for case in cases]}
    script = Path(__file__).parents[1] / "trl_losses.py"
    done = subprocess.run(
        [interpreter, str(script)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case, answer in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        loss, gradients, rewards = _our_answer(pairs, case)
        assert loss == pytest.approx(answer["loss"], rel=1e-5, abs=1e-6), case
        assert gradients == pytest.approx(answer["gradients"], rel=1e-4, abs=1e-6), case
        if not resolve_objective(case["loss"]).averages and "f_divergence" not in case:
            assert rewards == pytest.approx(answer["rewards"], rel=1e-4, abs=1e-6), case


def _as_trl_says(case: dict[str, Any]) -> dict[str, Any]:
    """Names and numbers of a case as TRL's configuration has them; its α-divergence counts from the other end."""
    objective = resolve_objective(**_numbers(case))
    divergences = {"js": "js_divergence", "alpha": "alpha_divergence"}
    return {
        "loss_type": [TRL_NAMES[loss.name] for loss in objective.losses],
        "loss_weights": [loss.weight for loss in objective.losses],
        "beta": objective.lead.beta,
        "label_smoothing": objective.lead.label_smoothing,
        "f_divergence_type": divergences.get(objective.f_divergence, objective.f_divergence),
        "f_alpha_divergence_coef": 1 - objective.f_alpha,
        "ld_alpha": case.get("ld_alpha"),
    }


def _numbers(case: dict[str, Any]) -> dict[str, Any]:
    numbers = dict(case)
    return {"text": numbers.pop("loss"), "beta": 0.1, **numbers}


def _our_answer(pairs: list[Any], case: dict[str, Any]) -> tuple[float, list[float], list[float]]:
    """Mean loss, its gradient in every token's log-probability, and the mean rewards."""
    policy_tokens, reference_tokens = (
        [[torch.tensor(side[who], dtype=torch.float64) for side in pair] for pair in pairs] for who in (0, 1)
    )
    leaves = [side.requires_grad_() for pair in policy_tokens for side in pair]
    policy = PairLogps(
        **_sums(policy_tokens),
        chosen_tokens_B=torch.tensor([len(chosen) for chosen, _ in policy_tokens]),
        rejected_tokens_B=torch.tensor([len(rejected) for _, rejected in policy_tokens]),
        token_logps_N=torch.empty(0),
        aux_loss=None,
    )
    reference = ReferenceLogps(**_sums(reference_tokens))
    numbers = _numbers(case)
    outcome = _loss(numbers.pop("text"), policy, reference, **numbers)
    assert outcome.chosen_rewards_B is not None
    assert outcome.rejected_rewards_B is not None
    loss = outcome.objective_B.mean()
    gradients = [value for gradient in torch.autograd.grad(loss, leaves) for value in gradient.tolist()]
    rewards = [outcome.chosen_rewards_B.mean().item(), outcome.rejected_rewards_B.mean().item()]
    return loss.item(), gradients, rewards


def _sums(tokens: list[list[Tensor]]) -> dict[str, Tensor]:
    """Sums over each side, and over what both sides of a pair have in common."""
    common = [min(len(chosen), len(rejected)) for chosen, rejected in tokens]
    return {
        "chosen_logps_B": torch.stack([chosen.sum() for chosen, _ in tokens]),
        "rejected_logps_B": torch.stack([rejected.sum() for _, rejected in tokens]),
        "chosen_common_logps_B": torch.stack([pair[0][:stop].sum() for pair, stop in zip(tokens, common, strict=True)]),
        "rejected_common_logps_B": torch.stack(
            [pair[1][:stop].sum() for pair, stop in zip(tokens, common, strict=True)]
        ),
    }

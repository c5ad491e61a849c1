"""Losses against numbers worked out by hand.

One pair throughout: πc = −10 over nc = 5 tokens, πr = −12 over nr = 4; fc = −11, fr = −10. So the log-ratios are
πc − fc = 1 and πr − fr = −2, hence Δ = 3; per token 0.2 and −0.5, hence avgΔ = 0.7; the policy's averages are −2
and −3.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.scoring_batch import PairLogps
from dpo_cache.pipeline.training.losses import LOSSES, ReferenceLogps, beta_warning, preference_loss, resolve_loss


def _policy(chosen: Any, rejected: Any, *, chosen_tokens: Any = 5, rejected_tokens: Any = 4) -> PairLogps:
    """One pair, or several given as lists; the sums are leaves of the graph."""
    chosen_B, rejected_B = (
        torch.tensor(value, dtype=torch.float64).reshape(-1).requires_grad_() for value in (chosen, rejected)
    )
    return PairLogps(
        chosen_logps_B=chosen_B,
        rejected_logps_B=rejected_B,
        chosen_common_logps_B=chosen_B,
        rejected_common_logps_B=rejected_B,
        chosen_tokens_B=torch.tensor(chosen_tokens).reshape(-1),
        rejected_tokens_B=torch.tensor(rejected_tokens).reshape(-1),
        token_logps_N=torch.empty(0),
        aux_loss=None,
    )


def _reference(chosen: Any, rejected: Any) -> ReferenceLogps:
    return ReferenceLogps(
        chosen_logps_B=torch.tensor(chosen, dtype=torch.float64).reshape(-1),
        rejected_logps_B=torch.tensor(rejected, dtype=torch.float64).reshape(-1),
    )


POLICY, REFERENCE = _policy(-10.0, -12.0), _reference(-11.0, -10.0)


def _log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpo", {"beta": 0.1}, -_log_sigmoid(0.3)),  # 0.554355
        ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, -0.8 * _log_sigmoid(0.3) - 0.2 * _log_sigmoid(-0.3)),
        ("dpo_norm", {}, -_log_sigmoid(3.5)),  # 5 · 0.7
        ("dpo_norm", {"beta": 2.0, "label_smoothing": 0.1}, -0.9 * _log_sigmoid(1.4) - 0.1 * _log_sigmoid(-1.4)),
        ("ipo", {"beta": 0.1}, (0.7 - 5) ** 2),  # 18.49
        ("ipo_sum", {"beta": 0.1}, (3 - 5) ** 2),  # 4
        ("hinge", {"beta": 0.1}, 0.7),
        ("hinge", {"beta": 0.5}, 0.0),
        ("robust", {"beta": 0.1, "label_smoothing": 0.2}, (-0.8 * _log_sigmoid(0.3) + 0.2 * _log_sigmoid(-0.3)) / 0.6),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25}, -_log_sigmoid(2 * (1 - 0.25))),
        ("wpo", {"beta": 0.1}, math.exp(-5) * -_log_sigmoid(0.3)),
    ],
)
def test_a_loss_is_its_equation(name: str, options: dict[str, float], expected: float) -> None:
    outcome = preference_loss(resolve_loss(name, **options), POLICY, REFERENCE)
    assert outcome.losses_B.tolist() == pytest.approx([expected], rel=1e-12)


def test_the_worked_figures_themselves() -> None:
    assert preference_loss(resolve_loss("dpo"), POLICY, REFERENCE).losses_B.item() == pytest.approx(0.5543552444685)
    assert preference_loss(resolve_loss("dpo_norm"), POLICY, REFERENCE).losses_B.item() == pytest.approx(
        0.02975041, 1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_the_sides_flips_the_margin(name: str) -> None:
    swapped_policy = _policy(-12.0, -10.0, chosen_tokens=4, rejected_tokens=5)
    swapped_reference = _reference(-10.0, -11.0)
    straight = preference_loss(resolve_loss(name), POLICY, REFERENCE)
    swapped = preference_loss(resolve_loss(name), swapped_policy, swapped_reference)
    assert swapped.average_margin_B.tolist() == (-straight.average_margin_B).tolist() == pytest.approx([-0.7])
    if straight.chosen_rewards_B is None or swapped.rejected_rewards_B is None:
        assert name == "simpo"
    else:
        assert straight.chosen_rewards_B.tolist() == swapped.rejected_rewards_B.tolist()


def test_rewards_and_logps_are_in_the_unit_of_the_loss() -> None:
    sums = preference_loss(resolve_loss("dpo", beta=0.1), POLICY, REFERENCE)
    averages = preference_loss(resolve_loss("dpo_norm", beta=5.0), POLICY, REFERENCE)
    assert sums.chosen_rewards_B is not None
    assert averages.chosen_rewards_B is not None
    assert averages.rejected_rewards_B is not None
    assert sums.chosen_rewards_B.tolist() == pytest.approx([0.1 * 1])
    assert sums.chosen_logps_B.tolist() == pytest.approx([-10.0])
    assert averages.chosen_rewards_B.tolist() == pytest.approx([5 * 0.2])
    assert averages.rejected_rewards_B.tolist() == pytest.approx([5 * -0.5])
    assert averages.rejected_logps_B.tolist() == pytest.approx([-3.0])


def test_a_loss_without_reference_has_no_rewards() -> None:
    outcome = preference_loss(resolve_loss("simpo"), POLICY, REFERENCE)
    assert outcome.chosen_rewards_B is None
    assert outcome.rejected_rewards_B is None


def test_wpo_weights_pass_no_gradient() -> None:
    policy = _policy(-10.0, -12.0)
    torch.autograd.backward(preference_loss(resolve_loss("wpo", beta=0.1), policy, REFERENCE).losses_B)
    # d/dπc of w·(−log σ(0.1·Δ)) with w = e⁻⁵ held: −w · 0.1 · σ(−0.3)
    assert policy.chosen_logps_B.grad is not None
    assert policy.chosen_logps_B.grad.tolist() == pytest.approx([-math.exp(-5) * 0.1 / (1 + math.exp(0.3))])


def test_wpo_weights_are_at_most_one() -> None:
    likely = _policy(5.0, 4.0)  # no log-probabilities, but the bound must hold
    assert preference_loss(resolve_loss("wpo"), likely, _reference(5.0, 4.0)).losses_B.tolist() == pytest.approx(
        [math.log(2)]
    )


def test_the_sum_over_pairs_is_the_sum_of_single_pairs() -> None:
    """A pair's loss must not depend on its neighbours."""
    both = _policy([-10.0, -3.0], [-12.0, -2.0], chosen_tokens=[5, 2], rejected_tokens=[4, 1])
    other = _policy(-3.0, -2.0, chosen_tokens=2, rejected_tokens=1)
    for name in LOSSES:
        settings = resolve_loss(name)
        alone = [
            preference_loss(settings, policy, reference).losses_B.item()
            for policy, reference in ((POLICY, REFERENCE), (other, _reference(-3.5, -1.0)))
        ]
        together = preference_loss(settings, both, _reference([-11.0, -3.5], [-10.0, -1.0])).losses_B
        assert together.tolist() == pytest.approx(alone)


def test_each_loss_brings_its_own_beta() -> None:
    assert resolve_loss("dpo").beta == 0.1
    assert resolve_loss("dpo_norm").beta == 5.0
    assert resolve_loss("simpo").beta == 2.0


@pytest.mark.parametrize(("name", "beta"), [("dpo_norm", 0.1), ("dpo", 5.0), ("simpo", 0.1), ("robust", 2.0)])
def test_a_beta_of_the_other_unit_is_warned_about(name: str, beta: float) -> None:
    warning = beta_warning(resolve_loss(name, beta=beta))
    assert warning is not None
    assert f"--beta {beta:g} looks wrong for --loss {name}" in warning


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_beta_is_not_warned_about(name: str) -> None:
    assert beta_warning(resolve_loss(name)) is None


def test_label_smoothing_is_refused_where_it_is_not_defined() -> None:
    with pytest.raises(DpoCacheError, match="--label-smoothing is not defined for --loss ipo"):
        resolve_loss("ipo", label_smoothing=0.1)
    with pytest.raises(DpoCacheError, match=r"--label-smoothing is 0\.5"):
        resolve_loss("robust", label_smoothing=0.5)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(DpoCacheError, match="--loss dop is unknown"):
        resolve_loss("dop")
    with pytest.raises(DpoCacheError, match=r"--beta is -1"):
        resolve_loss("dpo", beta=-1)
    with pytest.raises(DpoCacheError, match="--gamma-beta-ratio means nothing to --loss dpo"):
        resolve_loss("dpo", gamma_beta_ratio=0.5)

"""Preference losses: pure functions of log-probabilities, one term per pair, each with its equation.

Notation of the equations, for one pair: ``πc, πr, fc, fr`` are the summed log-probabilities of policy and
reference on the scored tokens of chosen and rejected, ``nc, nr`` the numbers of those tokens,
``Δ = (πc − fc) − (πr − fr)``, and ``avgΔ`` the same with every sum divided by its own count. ``ε`` is label
smoothing, ``σ`` the logistic function. Reducing over pairs happens elsewhere: the loss of a step is the sum over
the global batch divided by its number of pairs.

Variants that go by one name elsewhere have their own names here: ``dpo`` and ``dpo_norm``, ``ipo`` and ``ipo_sum``.

Shape suffix: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...errors import DpoCacheError
from ..scoring.scoring_batch import PairLogps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceLogps:
    """The cached log-probabilities of the reference, float64 of shape (B,), sums in nats."""

    chosen_logps_B: Tensor
    rejected_logps_B: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> ReferenceLogps:
        """The same values on ``device``."""
        return ReferenceLogps(
            chosen_logps_B=self.chosen_logps_B.to(device, non_blocking=non_blocking),
            rejected_logps_B=self.rejected_logps_B.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """One loss with its numbers; make it with :func:`resolve_loss`, which checks them.

    Attributes:
        name: A key of :data:`LOSSES`.
        beta: Strength of the pull towards the reference. For losses on averages it multiplies nats per token, for
            the others nats per answer, which is why no default fits all losses.
        label_smoothing: ε, the assumed probability that a pair's label is wrong, in [0, 0.5).
        gamma_beta_ratio: The target margin of ``simpo`` divided by beta (γ/β), in nats per token.
    """

    name: str
    beta: float
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.3

    @property
    def spec(self) -> LossSpec:
        """The entry of :data:`LOSSES` these settings belong to."""
        return LOSSES[self.name]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairTerms:
    """What the equations are made of, all float64 of shape (B,), differentiable in the policy.

    Attributes:
        chosen_B, rejected_B: Log-ratios ``πc − fc`` and ``πr − fr``.
        chosen_average_B, rejected_average_B: The same per scored token, ``(πc − fc)/nc`` and ``(πr − fr)/nr``.
        policy_chosen_average_B, policy_rejected_average_B: ``πc/nc`` and ``πr/nr``.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_average_B: Tensor
    rejected_average_B: Tensor
    policy_chosen_average_B: Tensor
    policy_rejected_average_B: Tensor

    def margin(self) -> Tensor:
        """Δ in nats, shape (B,)."""
        return self.chosen_B - self.rejected_B

    def average_margin(self) -> Tensor:
        """avgΔ in nats per token, shape (B,)."""
        return self.chosen_average_B - self.rejected_average_B


def pair_terms(policy: PairLogps, reference: ReferenceLogps) -> PairTerms:
    """Put policy and reference together, pair by pair."""
    chosen_B = policy.chosen_logps_B - reference.chosen_logps_B
    rejected_B = policy.rejected_logps_B - reference.rejected_logps_B
    return PairTerms(
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        chosen_average_B=chosen_B / policy.chosen_tokens_B,
        rejected_average_B=rejected_B / policy.rejected_tokens_B,
        policy_chosen_average_B=policy.chosen_logps_B / policy.chosen_tokens_B,
        policy_rejected_average_B=policy.rejected_logps_B / policy.rejected_tokens_B,
    )


def _smoothed_log_sigmoid_loss(logits_B: Tensor, label_smoothing: float) -> Tensor:
    """``−(1−ε)·log σ(x) − ε·log σ(−x)``."""
    return -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def dpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ)``.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with ε > 0 the conservative form of Mitchell 2023
    ("A note on DPO with noisy preferences", equation 3).
    """
    return _smoothed_log_sigmoid_loss(settings.beta * terms.margin(), settings.label_smoothing)


def dpo_norm(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(β·avgΔ) − ε·log σ(−β·avgΔ)``: DPO on averages per token.

    Length-normalised DPO of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124, equation 6), where β = 5.
    """
    return _smoothed_log_sigmoid_loss(settings.beta * terms.average_margin(), settings.label_smoothing)


def ipo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``(avgΔ − 1/(2β))²``, on averages per token.

    Azar et al. 2023 (arXiv 2310.12036), equation 17, with log-probabilities averaged over tokens, as its authors
    confirmed to the makers of trainers and as most of those implement it.
    """
    return (terms.average_margin() - 1 / (2 * settings.beta)) ** 2


def ipo_sum(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``(Δ − 1/(2β))²``, on sums: the letter of Azar et al. 2023 (arXiv 2310.12036), equation 17."""
    return (terms.margin() - 1 / (2 * settings.beta)) ** 2


def hinge(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``max(0, 1 − βΔ)``: SLiC's ranking term (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin, as in RSO
    (Liu et al. 2023, arXiv 2309.06657, equation 9)."""
    return torch.relu(1 - settings.beta * terms.margin())


def robust(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1 − 2ε)``, unbiased when a share ε of the labels is flipped.

    Chowdhury et al. 2024 (arXiv 2403.00409), equation 9. Single terms can be negative.
    """
    epsilon = settings.label_smoothing
    logits_B = settings.beta * terms.margin()
    return (-(1 - epsilon) * logsigmoid(logits_B) + epsilon * logsigmoid(-logits_B)) / (1 - 2 * epsilon)


def simpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(x) − ε·log σ(−x)`` with ``x = β·(πc/nc − πr/nr − γ/β)``; needs no reference.

    Meng et al. 2024 (arXiv 2405.14734), equation 6, where β = 2 and γ/β about 0.25 to 0.5.
    """
    margin_B = terms.policy_chosen_average_B - terms.policy_rejected_average_B - settings.gamma_beta_ratio
    return _smoothed_log_sigmoid_loss(settings.beta * margin_B, settings.label_smoothing)


def wpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``w · dpo`` with ``w = min(1, exp(πc/nc + πr/nr))``, a weight that passes no gradient.

    Zhou et al. 2024 (arXiv 2406.11827), equation 2, with the average per token as the length-normalised
    probability of an answer: pairs that the policy itself would hardly write count less.
    """
    weight_B = torch.exp(terms.policy_chosen_average_B + terms.policy_rejected_average_B).clamp(max=1.0).detach()
    return weight_B * dpo(terms, settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """What the rest of the trainer has to know about a loss.

    Attributes:
        pair_losses: The equation: :class:`PairTerms` and settings to losses of shape (B,).
        default_beta: Beta where none is given.
        usual_beta: Betas outside this range are warned about: they belong to a loss of the other unit.
        averages: It works on averages per token; rewards and the logged ``logps/*`` are averages too.
        uses_reference: Without a reference there are no rewards to log.
        smooths_labels: Label smoothing is defined for it.
    """

    pair_losses: Callable[[PairTerms, LossSettings], Tensor]
    default_beta: float
    usual_beta: tuple[float, float] = (0.0, 1.0)
    averages: bool = False
    uses_reference: bool = True
    smooths_labels: bool = False


LOSSES: dict[str, LossSpec] = {
    "dpo": LossSpec(pair_losses=dpo, default_beta=0.1, smooths_labels=True),
    "dpo_norm": LossSpec(
        pair_losses=dpo_norm, default_beta=5.0, usual_beta=(1.0, math.inf), averages=True, smooths_labels=True
    ),
    "ipo": LossSpec(pair_losses=ipo, default_beta=0.1, averages=True),
    "ipo_sum": LossSpec(pair_losses=ipo_sum, default_beta=0.1),
    "hinge": LossSpec(pair_losses=hinge, default_beta=0.1),
    "robust": LossSpec(pair_losses=robust, default_beta=0.1, smooths_labels=True),
    "simpo": LossSpec(
        pair_losses=simpo,
        default_beta=2.0,
        usual_beta=(1.0, math.inf),
        averages=True,
        uses_reference=False,
        smooths_labels=True,
    ),
    "wpo": LossSpec(pair_losses=wpo, default_beta=0.1, smooths_labels=True),
}


def resolve_loss(
    name: str,
    *,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float | None = None,
) -> LossSettings:
    """Settings of the loss ``name``, its own default for beta where none is given.

    Raises:
        DpoCacheError: An unknown name, a number out of range, or one that this loss has no use for.
    """
    spec = LOSSES.get(name)
    if spec is None:
        raise DpoCacheError(f"--loss {name} is unknown.", expected="one of " + ", ".join(LOSSES))
    beta = spec.default_beta if beta is None else beta
    if not (beta > 0 and math.isfinite(beta)):
        raise DpoCacheError(f"--beta is {beta}.", expected="a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise DpoCacheError(
            f"--label-smoothing is {label_smoothing}.",
            expected="a number from 0 up to, but not including, 0.5: at one half the labels say nothing",
        )
    if label_smoothing and not spec.smooths_labels:
        raise DpoCacheError(
            f"--label-smoothing is not defined for --loss {name}.",
            expected="one of " + ", ".join(key for key, known in LOSSES.items() if known.smooths_labels),
            next_step="leave --label-smoothing out, or choose another loss",
        )
    if gamma_beta_ratio is None:
        return LossSettings(name=name, beta=beta, label_smoothing=label_smoothing)
    if name != "simpo":
        raise DpoCacheError(f"--gamma-beta-ratio means nothing to --loss {name}.", expected="--loss simpo")
    return LossSettings(name=name, beta=beta, label_smoothing=label_smoothing, gamma_beta_ratio=gamma_beta_ratio)


def beta_warning(settings: LossSettings) -> str | None:
    """A sentence for the log when beta looks meant for another loss, else None."""
    low, high = settings.spec.usual_beta
    if low <= settings.beta <= high:
        return None
    unit, reason = (
        ("averages per token", "an average moves far less than a sum, so beta is usually 2 to 10")
        if settings.spec.averages
        else ("sums over the answer", "beta is usually 0.01 to 0.5")
    )
    return (
        f"--beta {settings.beta:g} looks wrong for --loss {settings.name}, which works on {unit}: {reason} "
        f"(default {settings.spec.default_beta:g})."
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairOutcomes:
    """What one forward pass says about its pairs; float64 of shape (B,).

    Attributes:
        losses_B: Loss of each pair, differentiable.
        chosen_rewards_B, rejected_rewards_B: ``β·(πc − fc)`` and ``β·(πr − fr)``, of averages where the loss works
            on averages; without gradient. None for a loss without a reference.
        chosen_logps_B, rejected_logps_B: The policy's log-probabilities in the loss's unit, without gradient.
        average_margin_B: avgΔ in nats per token, which tells a tie from a difference whatever the loss's unit.
    """

    losses_B: Tensor
    chosen_rewards_B: Tensor | None
    rejected_rewards_B: Tensor | None
    chosen_logps_B: Tensor
    rejected_logps_B: Tensor
    average_margin_B: Tensor

    def detached(self) -> PairOutcomes:
        """The same without the graph that the losses hang on."""
        return replace(self, losses_B=self.losses_B.detach())


def preference_loss(settings: LossSettings, policy: PairLogps, reference: ReferenceLogps) -> PairOutcomes:
    """The loss of each pair, and the rewards that go with it."""
    spec = settings.spec
    terms = pair_terms(policy, reference)
    losses_B = spec.pair_losses(terms, settings)
    with torch.no_grad():
        return PairOutcomes(
            losses_B=losses_B,
            chosen_rewards_B=_reward(spec, settings, terms.chosen_B, terms.chosen_average_B),
            rejected_rewards_B=_reward(spec, settings, terms.rejected_B, terms.rejected_average_B),
            chosen_logps_B=(terms.policy_chosen_average_B if spec.averages else policy.chosen_logps_B).detach(),
            rejected_logps_B=(terms.policy_rejected_average_B if spec.averages else policy.rejected_logps_B).detach(),
            average_margin_B=terms.average_margin(),
        )


def _reward(spec: LossSpec, settings: LossSettings, sum_B: Tensor, average_B: Tensor) -> Tensor | None:
    if not spec.uses_reference:
        return None
    return settings.beta * (average_B if spec.averages else sum_B).detach()

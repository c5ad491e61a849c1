"""The losses most runs use: pure functions, one term per pair, each with its equation.

The notation is that of ``pair_terms.py``. Reducing over pairs happens elsewhere: the loss of a step is the sum over
the global batch divided by its number of pairs. Variants that go by one name elsewhere have their own names here:
``dpo`` and ``dpo_norm``, ``ipo`` and ``ipo_sum``.

Shape suffix: B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .objective import LossSettings
from .pair_terms import PairTerms


def smoothed_log_sigmoid_loss(logits_B: Tensor, label_smoothing: float) -> Tensor:
    """``−(1−ε)·log σ(x) − ε·log σ(−x)``."""
    return -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def dpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ)``.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with ε > 0 the conservative form of Mitchell 2023
    ("A note on DPO with noisy preferences", equation 3).
    """
    return smoothed_log_sigmoid_loss(settings.beta * terms.margin(), settings.label_smoothing)


def dpo_norm(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(β·avgΔ) − ε·log σ(−β·avgΔ)``: DPO on averages per token.

    Length-normalised DPO of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124), where β = 5.
    """
    return smoothed_log_sigmoid_loss(settings.beta * terms.average_margin(), settings.label_smoothing)


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
    (Liu et al. 2023, arXiv 2309.06657)."""
    return torch.relu(1 - settings.beta * terms.margin())


def robust(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1 − 2ε)``, unbiased when a share ε of the labels is flipped.

    Chowdhury et al. 2024 (arXiv 2403.00409). Single terms can be negative.
    """
    epsilon = settings.label_smoothing
    logits_B = settings.beta * terms.margin()
    return (-(1 - epsilon) * logsigmoid(logits_B) + epsilon * logsigmoid(-logits_B)) / (1 - 2 * epsilon)


def simpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(x) − ε·log σ(−x)`` with ``x = β·(πc/nc − πr/nr − γ/β)``; needs no reference.

    Meng et al. 2024 (arXiv 2405.14734), where β = 2 and γ/β about 0.25 to 0.5.
    """
    margin_B = terms.policy_chosen_average_B - terms.policy_rejected_average_B - settings.gamma_beta_ratio
    return smoothed_log_sigmoid_loss(settings.beta * margin_B, settings.label_smoothing)


def wpo(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``w · dpo`` with ``w = min(1, exp(πc/nc + πr/nr))``, a weight that passes no gradient.

    Zhou et al. 2024 (arXiv 2406.11827), with the average per token as the length-normalised
    probability of a response: pairs that the policy itself would hardly write count less.
    """
    weight_B = torch.exp(terms.policy_chosen_average_B + terms.policy_rejected_average_B).clamp(max=1.0).detach()
    return weight_B * dpo(terms, settings)

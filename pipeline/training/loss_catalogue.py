"""The rest of the losses for pairs: pure functions, one term per pair, each with its equation.

The notation is that of ``pair_terms.py``; ``losses.py`` holds the losses most runs use.

Shape suffix: B pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .losses import smoothed_log_sigmoid_loss
from .objective import LossSettings
from .pair_terms import PairTerms


def exo_pair(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``q·(log q − log(1−ε)) + (1−q)·(log(1−q) − log ε)`` with ``q = σ(βΔ)``: the reverse KL to a smoothed label.

    EXO-pref of Ji et al. 2024 (arXiv 2402.00856), where ε = 1e-3; without ε it is infinite.
    """
    epsilon = settings.label_smoothing
    logits_B = settings.beta * terms.margin()
    log_q_B, log_rest_B = logsigmoid(logits_B), logsigmoid(-logits_B)
    chosen_B = log_q_B.exp() * (log_q_B - math.log1p(-epsilon))
    return chosen_B + log_rest_B.exp() * (log_rest_B - math.log(epsilon))


def nca_pair(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−log σ(β·rc) − ½·log σ(−β·rc) − ½·log σ(−β·rr)``: keeps the likelihood of the chosen response up.

    Noise contrastive alignment, Chen et al. 2024 (arXiv 2402.05369), for two responses with hard labels.
    """
    chosen_B, rejected_B = settings.beta * terms.chosen_B, settings.beta * terms.rejected_B
    return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)


def bco_pair(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−log σ(β·rc) − log σ(−β·rr)``.

    Binary classifier optimisation, Jung et al. 2024 (arXiv 2404.04656), with its reward shift δ held at 0.
    """
    return -logsigmoid(settings.beta * terms.chosen_B) - logsigmoid(-settings.beta * terms.rejected_B)


def sppo_hard(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``(rc − 1/(2β))² + (rr + 1/(2β))²``.

    Self-play preference optimisation, Wu et al. 2024 (arXiv 2405.00675): its squared loss with η = 1/β = 1000 and
    the probability of winning taken as 1 for the chosen response and 0 for the rejected.
    """
    target = 1 / (2 * settings.beta)
    return (terms.chosen_B - target) ** 2 + (terms.rejected_B + target) ** 2


def aot(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(βδ) − ε·log σ(−βδ)``, ``δ`` = i-th smallest ``πc − πr`` less i-th smallest ``fc − fr``.

    Alignment by optimal transport, Melnyk et al. 2024 (arXiv 2406.05882), paired: the policy's margins as
    a whole are to lie above the reference's. Sorted over the global batch; the reference's margins carry no
    gradient, so each pair's term needs only the one that its own place in the order is matched with.
    """
    assert terms.partners is not None
    delta_B = terms.policy_margin_B - terms.partners.reference_margin_B
    return smoothed_log_sigmoid_loss(settings.beta * delta_B, settings.label_smoothing)


def aot_unpaired(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−ε)·log σ(βδ) − ε·log σ(−βδ)``, ``δ`` = i-th smallest ``rc`` less i-th smallest ``rr``.

    Melnyk et al. 2024 (arXiv 2406.05882), unpaired, sorted over the global batch. The two ends of a ``δ``
    belong to different pairs. Each pair gives the terms of both its ends, with the other end held fixed; so every
    ``δ`` occurs twice in a batch, once with the gradient of each end, and its value counts half.
    """
    assert terms.partners is not None
    as_chosen_B = settings.beta * (terms.chosen_B - terms.partners.rejected_B)
    as_rejected_B = settings.beta * (terms.partners.chosen_B - terms.rejected_B)
    both_B = smoothed_log_sigmoid_loss(as_chosen_B, settings.label_smoothing) + smoothed_log_sigmoid_loss(
        as_rejected_B, settings.label_smoothing
    )
    return both_B - both_B.detach() / 2


def apo_zero(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``1 − σ(β·rc) + σ(β·rr)``: chosen up, rejected down; for chosen responses better than the policy's own.

    APO-zero of anchored preference optimisation, D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    return torch.sigmoid(-settings.beta * terms.chosen_B) + torch.sigmoid(settings.beta * terms.rejected_B)


def apo_down(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``σ(β·rc) + 1 − σ(βΔ)``: both down, rejected further; for chosen responses worse than the policy's own.

    APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    margin_B = terms.chosen_B - terms.rejected_B
    return torch.sigmoid(settings.beta * terms.chosen_B) + torch.sigmoid(-settings.beta * margin_B)


_DISCOPOP_TEMPERATURE = 0.05


def discopop(terms: PairTerms, settings: LossSettings) -> Tensor:
    """``−(1−m)·log σ(x) + m·exp(−x)`` with ``x = βΔ`` and ``m = σ(x/τ)``, τ = 0.05.

    Log-ratio modulated loss, Lu et al. 2024 (arXiv 2406.08414), where β = 0.05. The product ``m·exp(−x)``
    is taken in one exponent: for a wrong pair its factors are 0 and infinity.
    """
    logits_B = settings.beta * terms.margin()
    modulation_B = logits_B / _DISCOPOP_TEMPERATURE
    return torch.exp(logsigmoid(modulation_B) - logits_B) - torch.sigmoid(-modulation_B) * logsigmoid(logits_B)

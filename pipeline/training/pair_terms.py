"""What the equations of losses are made of: log-probabilities of policy and reference, put together pair by pair.

Notation of all equations, for one pair: ``πc, πr, fc, fr`` are the summed log-probabilities of policy and reference
on the scored tokens of chosen and rejected, ``nc, nr`` the numbers of those tokens, ``rc = πc − fc`` and
``rr = πr − fr`` the log-ratios, ``Δ = rc − rr``, and ``avgΔ = rc/nc − rr/nr``. ``ε`` is label smoothing, ``σ`` the
logistic function.

Shape suffix: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..scoring.scoring_batch import PairLogps
from .objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferenceLogps:
    """The cached log-probabilities of the reference, float64 of shape (B,), sums in nats.

    Attributes:
        chosen_logps_B, rejected_logps_B: Over the scored tokens of a side.
        chosen_common_logps_B, rejected_common_logps_B: Over the first min(nc, nr) of them.
    """

    chosen_logps_B: Tensor
    rejected_logps_B: Tensor
    chosen_common_logps_B: Tensor
    rejected_common_logps_B: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> ReferenceLogps:
        """The same values on ``device``."""
        return self._with_columns(lambda column_B: column_B.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ReferenceLogps:
        """The same values in page-locked memory."""
        return self._with_columns(Tensor.pin_memory)

    def _with_columns(self, change: Callable[[Tensor], Tensor]) -> ReferenceLogps:
        return ReferenceLogps(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SortedPartners:
    """What a pair is compared with where the objective sorts the global batch; float64 of shape (B,), without gradient.

    Attributes:
        reference_margin_B: ``fc − fr`` of the pair that holds the same place when the global batch is sorted by it
            as this pair holds when the batch is sorted by ``πc − πr``.
        rejected_B: ``rr`` of the pair that holds the same place by ``rr`` as this pair by ``rc``.
        chosen_B: ``rc`` of the pair that holds the same place by ``rc`` as this pair by ``rr``.
    """

    reference_margin_B: Tensor
    rejected_B: Tensor
    chosen_B: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairTerms:
    """The terms of the equations, all float64 of shape (B,), differentiable in the policy.

    Attributes:
        chosen_B, rejected_B: The log-ratios ``rc`` and ``rr``.
        chosen_score_B, rejected_score_B: ``f′(u)`` at ``u = exp(rc)`` and ``exp(rr)``, for the f-divergence asked for;
            the log-ratios themselves for the reverse KL.
        policy_margin_B, reference_margin_B: ``πc − πr`` and ``fc − fr``.
        chosen_average_B, rejected_average_B: ``rc/nc`` and ``rr/nr``.
        policy_chosen_average_B, policy_rejected_average_B: ``πc/nc`` and ``πr/nr``.
        partners: Where the objective sorts the global batch.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    chosen_score_B: Tensor
    rejected_score_B: Tensor
    policy_margin_B: Tensor
    reference_margin_B: Tensor
    chosen_average_B: Tensor
    rejected_average_B: Tensor
    policy_chosen_average_B: Tensor
    policy_rejected_average_B: Tensor
    partners: SortedPartners | None

    def margin(self) -> Tensor:
        """Δ in nats, shape (B,); with another f-divergence ``f′(exp rc) − f′(exp rr)`` in its place."""
        return self.chosen_score_B - self.rejected_score_B

    def average_margin(self) -> Tensor:
        """avgΔ in nats per token, shape (B,)."""
        return self.chosen_average_B - self.rejected_average_B


def pair_terms(
    objective: Objective, policy: PairLogps, reference: ReferenceLogps, partners: SortedPartners | None = None
) -> PairTerms:
    """Put policy and reference together, pair by pair."""
    policy_chosen_B, reference_chosen_B, policy_rejected_B, reference_rejected_B = (
        weigh_tail(sums_B, common_B, objective.ld_alpha)
        for sums_B, common_B in (
            (policy.chosen_logps_B, policy.chosen_common_logps_B),
            (reference.chosen_logps_B, reference.chosen_common_logps_B),
            (policy.rejected_logps_B, policy.rejected_common_logps_B),
            (reference.rejected_logps_B, reference.rejected_common_logps_B),
        )
    )
    chosen_B = policy_chosen_B - reference_chosen_B
    rejected_B = policy_rejected_B - reference_rejected_B
    return PairTerms(
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        chosen_score_B=divergence_score(chosen_B, objective.f_divergence, objective.f_alpha),
        rejected_score_B=divergence_score(rejected_B, objective.f_divergence, objective.f_alpha),
        policy_margin_B=policy_chosen_B - policy_rejected_B,
        reference_margin_B=reference_chosen_B - reference_rejected_B,
        chosen_average_B=chosen_B / policy.chosen_tokens_B,
        rejected_average_B=rejected_B / policy.rejected_tokens_B,
        policy_chosen_average_B=policy.chosen_logps_B / policy.chosen_tokens_B,
        policy_rejected_average_B=policy.rejected_logps_B / policy.rejected_tokens_B,
        partners=partners,
    )


def weigh_tail(sums_B: Tensor, common_B: Tensor, ld_alpha: float) -> Tensor:
    """``common + α·(sum − common)``: tokens past the length of the pair's shorter response count α.

    LD-DPO (Liu et al. 2024, arXiv 2409.06411), for policy and reference alike.
    """
    if ld_alpha == 1:
        return sums_B  # to the last bit
    return common_B + ld_alpha * (sums_B - common_B)


_LARGEST_EXPONENT = 40.0
"""exp(40) and its square, which ``ipo_sum`` takes, still fit into the float32 that gradients travel in."""


def divergence_score(log_ratio_B: Tensor, f_divergence: str, f_alpha: float) -> Tensor:
    """``f′(u)`` at ``u = π/π_ref = exp(r)``, up to a constant that makes it 0 at u = 1 and cancels in Δ.

    Wang et al. 2023 (arXiv 2309.16240): ``log u`` for the reverse KL, ``1 − 1/u`` for the forward KL,
    ``log(2u/(1 + u))`` for Jensen-Shannon, ``(1 − u^−α)/α`` for the α-divergence with 0 < α < 1.
    """
    match f_divergence:
        case "forward_kl":
            return -torch.expm1((-log_ratio_B).clamp(max=_LARGEST_EXPONENT))
        case "js":
            return math.log(2) + logsigmoid(log_ratio_B)
        case "alpha":
            return -torch.expm1((-f_alpha * log_ratio_B).clamp(max=_LARGEST_EXPONENT)) / f_alpha
    assert f_divergence == "reverse_kl"
    return log_ratio_B

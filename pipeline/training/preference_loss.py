"""From log-probabilities to the objective and to what is logged, pair by pair.

Shape suffix: B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..scoring.scoring_batch import PairLogps
from . import loss_catalogue, losses
from .objective import LossSettings, Objective
from .pair_terms import PairTerms, ReferenceLogps, SortedPartners, pair_terms

LOSSES: dict[str, Callable[[PairTerms, LossSettings], Tensor]] = {
    "dpo": losses.dpo,
    "dpo_norm": losses.dpo_norm,
    "ipo": losses.ipo,
    "ipo_sum": losses.ipo_sum,
    "hinge": losses.hinge,
    "robust": losses.robust,
    "simpo": losses.simpo,
    "wpo": losses.wpo,
    "exo_pair": loss_catalogue.exo_pair,
    "nca_pair": loss_catalogue.nca_pair,
    "bco_pair": loss_catalogue.bco_pair,
    "sppo_hard": loss_catalogue.sppo_hard,
    "aot": loss_catalogue.aot,
    "aot_unpaired": loss_catalogue.aot_unpaired,
    "apo_zero": loss_catalogue.apo_zero,
    "apo_down": loss_catalogue.apo_down,
    "discopop": loss_catalogue.discopop,
}
"""The equation behind every name of ``objective.LOSS_TRAITS``."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairOutcomes:
    """What one forward pass says about its pairs; float64 of shape (B,).

    Attributes:
        objective_B: The objective's value for each pair, differentiable; its mean is logged as the loss.
        chosen_rewards_B, rejected_rewards_B: ``β·rc`` and ``β·rr`` (with another f-divergence ``β·f′``), of averages
            where the lead loss works on averages; without gradient. None for an objective without a reference.
        chosen_logps_B, rejected_logps_B: The policy's log-probabilities in the lead loss's unit, without gradient.
        margin_per_token_B: What the two rewards differ by, in nats per token, to be held against rounding: avgΔ where
            the lead loss works on averages, else rc − rr over the mean length of the two responses. Without gradient.
    """

    objective_B: Tensor
    chosen_rewards_B: Tensor | None
    rejected_rewards_B: Tensor | None
    chosen_logps_B: Tensor
    rejected_logps_B: Tensor
    margin_per_token_B: Tensor

    def detached(self) -> PairOutcomes:
        """The same values without the graph."""
        return replace(self, objective_B=self.objective_B.detach())


def preference_loss(
    objective: Objective, policy: PairLogps, reference: ReferenceLogps, partners: SortedPartners | None = None
) -> PairOutcomes:
    """The objective of each pair, and the rewards that go with it.

    Args:
        objective: What the run minimises.
        policy: Log-probabilities of the forward pass.
        reference: Log-probabilities of the cache, the same pairs in the same order.
        partners: Where the objective sorts the global batch.
    """
    terms = pair_terms(objective, policy, reference, partners)
    objective_B = _pair_objective(objective, terms)
    with torch.no_grad():
        averages = objective.averages
        return PairOutcomes(
            objective_B=objective_B,
            chosen_rewards_B=_reward(objective, terms.chosen_score_B, terms.chosen_average_B),
            rejected_rewards_B=_reward(objective, terms.rejected_score_B, terms.rejected_average_B),
            chosen_logps_B=(terms.policy_chosen_average_B if averages else policy.chosen_logps_B).detach(),
            rejected_logps_B=(terms.policy_rejected_average_B if averages else policy.rejected_logps_B).detach(),
            margin_per_token_B=_margin_per_token(objective, policy, terms),
        )


def objective_at_reference(objective: Objective) -> float | None:
    """The objective of a pair whose policy equals its reference; None where it depends on more than that."""
    if not objective.fixed_at_reference:
        return None
    zero_B, one_B = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    policy = PairLogps(zero_B, zero_B, zero_B, zero_B, one_B, one_B, zero_B, None)
    reference = ReferenceLogps(
        chosen_logps_B=zero_B,
        rejected_logps_B=zero_B,
        chosen_common_logps_B=zero_B,
        rejected_common_logps_B=zero_B,
    )
    partners = SortedPartners(reference_margin_B=zero_B, rejected_B=zero_B, chosen_B=zero_B)
    return float(preference_loss(objective, policy, reference, partners).objective_B)


def _pair_objective(objective: Objective, terms: PairTerms) -> Tensor:
    """The weighted sum of the losses, plus ``nll_coef·(−πc/nc)``.

    The likelihood term is an average over the tokens of the chosen response, so a long one weighs as much as a short
    one, as in iterative RPO (Pang et al. 2024, arXiv 2404.19733).
    """
    objective_B = torch.zeros_like(terms.chosen_B)
    for loss in objective.losses:
        objective_B = objective_B + loss.weight * LOSSES[loss.name](terms, loss)
    if objective.nll_coef:
        objective_B = objective_B - objective.nll_coef * terms.policy_chosen_average_B
    return objective_B


def _reward(objective: Objective, score_B: Tensor, average_B: Tensor) -> Tensor | None:
    if not objective.uses_reference:
        return None
    return objective.lead.beta * (average_B if objective.averages else score_B)


def _margin_per_token(objective: Objective, policy: PairLogps, terms: PairTerms) -> Tensor:
    """Rounding of so much per token on both sides moves either by twice as much at most."""
    if objective.averages:
        return terms.average_margin()
    return 2 * (terms.chosen_B - terms.rejected_B) / (policy.chosen_tokens_B + policy.rejected_tokens_B)

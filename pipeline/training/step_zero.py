"""The proof that policy and cache speak of the same thing, made on the first global batch before its update.

A policy that starts from the reference must give the cached numbers back. What differs then is rounding alone: other
batch shapes, another order of sums. A wrong template, mask, position, kernel or weight shows as a difference per
token far above it.

Shape suffixes: B pairs, S = 2B sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...errors import DpoCacheError
from ..scoring.side_bounds import AVERAGING_TOKENS, BOUNDS, long_side_bound, side_bounds
from .micro_batch import ScoredMicroBatch
from .objective import Objective
from .preference_loss import objective_at_reference

SMALLEST_TIE = {"float32": 5e-6, "bfloat16": 0.0}
"""In float32 a first batch may round to the very same values where the next one does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepZeroFigures:
    """How far policy and cache were apart; distances are ``|policy − reference| / scored tokens`` of a side.

    Attributes:
        dtype: Dtype computed in.
        pairs, sides: How many were compared.
        mean_per_token, max_per_token: Distance in nats per token, over sides.
        max_in_bounds: The largest share that a side's distance has of what its length allows.
        bound_per_token: The largest distance allowed of a side that is not short, and of the mean over all sides.
        loss: Loss of the batch.
        expected_loss: The loss were policy and cache exactly alike; None where it depends on the policy too.
        within_bound: The verdict.
    """

    dtype: str
    pairs: int
    sides: int
    mean_per_token: float
    max_per_token: float
    max_in_bounds: float
    bound_per_token: float
    loss: float
    expected_loss: float | None
    within_bound: bool

    def tie_margin(self, *, policy_is_reference: bool) -> float:
        """A difference between a pair's two sides, in nats per token, that rounding alone explains.

        Twice the largest distance seen, for both sides round, with short sides taken as the long ones that they stand
        for: the noise of a single token would hide what longer answers learn. Never more than the bound of bfloat16,
        the coarsest rounding there is; what is beyond that (a policy that alone is quantized) is not rounding.

        Args:
            policy_is_reference: Whether the policy starts from the reference's weights. They may be computed with
                otherwise, and so be beyond the bound. Of other weights beyond the bound nothing is known: 0.
        """
        if not (self.within_bound or policy_is_reference):
            return 0.0
        seen = 2 * self.max_in_bounds * self.bound_per_token
        return min(max(SMALLEST_TIE[self.dtype], seen), BOUNDS["bfloat16"])

    def summary(self) -> str:
        """How far they were apart, for people."""
        return (
            f"before any update, policy and cached reference differ by {self.max_per_token:.3g} nats per token "
            f"(mean {self.mean_per_token:.3g}) on the {self.pairs} pairs of the first batch"
        )


class StepZeroProof:
    """Collects the first global batch, then judges it.

    Args:
        objective: What is trained.
        dtype: ``float32`` or ``bfloat16``.
        device: Where the sums are kept.
    """

    def __init__(self, objective: Objective, *, dtype: str, device: torch.device) -> None:
        self._objective = objective
        self._dtype = dtype
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # pairs, distances of sides, losses
        self._worst = torch.zeros(2, dtype=torch.float64, device=device)  # distance, and its share of its bound

    def add(self, scored: ScoredMicroBatch) -> None:
        """Compare the sides of one micro-batch."""
        policy, reference = scored.policy, scored.micro_batch.reference
        tokens_S = torch.cat([policy.chosen_tokens_B, policy.rejected_tokens_B])
        chosen_B = (policy.chosen_logps_B - reference.chosen_logps_B).abs()
        rejected_B = (policy.rejected_logps_B - reference.rejected_logps_B).abs()
        distances_S = torch.cat([chosen_B, rejected_B]) / tokens_S
        pairs = self._sums.new_tensor(scored.micro_batch.num_pairs)
        self._sums += torch.stack([pairs, distances_S.sum(), scored.outcomes.objective_B.sum()])
        if len(distances_S):
            in_bounds_S = distances_S / side_bounds(self._dtype, tokens_S)
            self._worst = torch.maximum(self._worst, torch.stack([distances_S.max(), in_bounds_S.max()]))

    def figures(self) -> StepZeroFigures:
        """Bring the ranks together; collective, with the same result on all of them."""
        sums, worst = self._sums.clone(), self._worst.clone()
        dist.all_reduce(sums)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        pairs, distances, losses = sums.tolist()
        largest, in_bounds = worst.tolist()
        mean, bound = distances / (2 * pairs), long_side_bound(self._dtype)
        return StepZeroFigures(
            dtype=self._dtype,
            pairs=int(pairs),
            sides=int(2 * pairs),
            mean_per_token=mean,
            max_per_token=largest,
            max_in_bounds=in_bounds,
            bound_per_token=bound,
            loss=losses / pairs,
            expected_loss=objective_at_reference(self._objective),
            # Written so that a distance that is not a number is not within the bound.
            within_bound=in_bounds <= 1 and mean <= bound,
        )


def check_step_zero(figures: StepZeroFigures) -> None:
    """Stop a run whose policy is not what the cache was made with.

    Raises:
        DpoCacheError: A distance is above its bound or not a number, or the mean is above the bound.
    """
    if figures.within_bound:
        return
    short = "" if figures.dtype == "float32" else f" (more for one side of under {AVERAGING_TOKENS} scored tokens)"
    raise DpoCacheError(
        figures.summary(),
        expected=f"at most {figures.bound_per_token:g} in {figures.dtype}{short}: a policy that starts from the "
        "reference gives the cached values back",
        next_step="the weights are those that the cache names, so what usually differs is a library's version or the "
        "hardware since the cache was built (compare with `dpo-cache info`), or the values were imported from another "
        "model; build the cache again here, or add --allow-numerics-mismatch to train on the difference",
    )

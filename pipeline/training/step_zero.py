"""The proof that policy and cache speak of the same thing, made on the first global batch before its update.

A policy that starts from the reference must give the cached numbers back. What differs then is rounding alone: other
batch shapes, another order of sums. A wrong template, mask, position, kernel or weight shows as a difference per
token far above it.

Shape suffixes: B pairs, S = 2B sides.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ...errors import DpoCacheError
from .micro_batch import ScoredMicroBatch
from .objective import Objective
from .preference_loss import objective_at_reference
from .run_file import write_run_json

BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference allowed, in nats per scored token of a side, by the dtype computed in.

Float32 rounds at 6e-8 relative, and logits of some tens through some tens of layers end some 1e-6 apart; what is
systematic, such as one wrong token in a thousand, is above 1e-3. Bfloat16 rounds at 4e-3, one token's logp moves by
up to 1e-1 between batch shapes, and a side's average by up to 1e-2 when it is short.
"""

SMALLEST_TIE = {"float32": 5e-6, "bfloat16": 0.0}
"""In float32 a first batch may round to the very same values where the next one does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepZeroFigures:
    """How far policy and cache were apart; distances are ``|policy − reference| / scored tokens`` of a side.

    Attributes:
        dtype: Dtype computed in.
        pairs, sides: How many were compared.
        mean_per_token, max_per_token: Distance in nats per token, over sides.
        bound_per_token: The largest allowed.
        loss: Loss of the batch.
        expected_loss: The loss were policy and cache exactly alike; None where it depends on the policy too.
        within_bound: The verdict.
    """

    dtype: str
    pairs: int
    sides: int
    mean_per_token: float
    max_per_token: float
    bound_per_token: float
    loss: float
    expected_loss: float | None
    within_bound: bool

    @property
    def tie_margin(self) -> float:
        """A difference between a pair's two sides, in nats per token, that rounding alone explains.

        Twice the largest distance seen, for both sides round. Of a policy that is not the reference nothing is known.
        """
        return max(SMALLEST_TIE[self.dtype], 2 * self.max_per_token) if self.within_bound else 0.0

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
        self._max = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, scored: ScoredMicroBatch) -> None:
        """Compare the sides of one micro-batch."""
        policy, reference = scored.policy, scored.micro_batch.reference
        chosen_B = (policy.chosen_logps_B - reference.chosen_logps_B).abs() / policy.chosen_tokens_B
        rejected_B = (policy.rejected_logps_B - reference.rejected_logps_B).abs() / policy.rejected_tokens_B
        distances_S = torch.cat([chosen_B, rejected_B])
        pairs = self._sums.new_tensor(scored.micro_batch.num_pairs)
        self._sums += torch.stack([pairs, distances_S.sum(), scored.outcomes.objective_B.sum()])
        if len(distances_S):
            self._max = torch.maximum(self._max, distances_S.max())

    def figures(self) -> StepZeroFigures:
        """Bring the ranks together; collective, with the same result on all of them."""
        sums, worst = self._sums.clone(), self._max.clone()
        dist.all_reduce(sums)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        pairs, distances, losses = sums.tolist()
        bound = BOUNDS[self._dtype]
        return StepZeroFigures(
            dtype=self._dtype,
            pairs=int(pairs),
            sides=int(2 * pairs),
            mean_per_token=distances / (2 * pairs),
            max_per_token=float(worst),
            bound_per_token=bound,
            loss=losses / pairs,
            expected_loss=objective_at_reference(self._objective),
            # Written so that a distance that is not a number is not within the bound.
            within_bound=float(worst) <= bound and math.isfinite(distances),
        )


def check_step_zero(figures: StepZeroFigures) -> None:
    """Stop a run whose policy is not what the cache was made with.

    Raises:
        DpoCacheError: The largest distance is above the bound, or not a number.
    """
    if figures.within_bound:
        return
    raise DpoCacheError(
        figures.summary(),
        expected=f"at most {figures.bound_per_token:g} in {figures.dtype}: a policy that starts from the reference "
        "gives the cached values back",
        next_step="what usually differs is the policy's weights (--model is not the reference, or was overwritten "
        "since), then the dtype, the attention kernel or a library's version since the cache was built (compare with "
        "`dpo-cache info`); --allow-other-policy trains a policy that is meant to differ",
    )


def write_step_zero(path: Path, figures: StepZeroFigures) -> None:
    """Keep the figures as JSON: a resumed run reads them back, and people can check later what a run began with."""
    write_run_json(path, asdict(figures))


def read_step_zero(path: Path) -> StepZeroFigures | None:
    """What :func:`write_step_zero` wrote; None where the file is gone."""
    return StepZeroFigures(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

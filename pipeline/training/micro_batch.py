"""The pairs one rank runs in one micro-step, ready for the device, and what became of them.

Shape suffix: B pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cache.scored_pair import ScoredPair
from ..scoring.layouts import scoring_batch
from ..scoring.scoring_batch import Layout, PairLogps, ScoringBatch
from .pair_terms import ReferenceLogps, SortedPartners
from .preference_loss import PairOutcomes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """Tokens, reference values and keys of the same pairs in the same order; no pairs at all are allowed.

    ``partners`` are there where the objective sorts the global batch, on the device where the pairs were scored.
    """

    batch: ScoringBatch
    reference: ReferenceLogps
    keys: tuple[bytes, ...]
    partners: SortedPartners | None = None

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.keys)

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory, from which it can move to a GPU while that computes."""
        return replace(self, batch=self.batch.pin_memory(), reference=self.reference.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        return replace(
            self,
            batch=self.batch.to(device, non_blocking=non_blocking),
            reference=self.reference.to(device, non_blocking=non_blocking),
        )


def collate(pairs: Sequence[ScoredPair], layout: Layout) -> MicroBatch:
    """Lay the rows of a cache out for the model. Without rows: the batch a rank runs only to take part."""
    return MicroBatch(
        batch=scoring_batch([row.pair for row in pairs], layout),
        reference=ReferenceLogps(
            chosen_logps_B=_column([row.ref_chosen_logps for row in pairs]),
            rejected_logps_B=_column([row.ref_rejected_logps for row in pairs]),
            chosen_common_logps_B=_column([row.ref_chosen_common_logps for row in pairs]),
            rejected_common_logps_B=_column([row.ref_rejected_common_logps for row in pairs]),
        ),
        keys=tuple(row.key for row in pairs),
    )


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredMicroBatch:
    """A micro-batch after its forward pass; nothing in it carries a gradient any more."""

    micro_batch: MicroBatch
    policy: PairLogps
    outcomes: PairOutcomes

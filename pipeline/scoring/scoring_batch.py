"""The one record that a batch is, whatever its layout, and what scoring it gives.

Shapes: B pairs, S = 2B sides (chosen rows first), R rows, T tokens a row, N scored tokens (each computed once),
M references to them (a scored token counts once for every side it belongs to).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(StrEnum):
    """How the sequences of a batch lie in its rows."""

    PREFIX_SHARED = "prefix-shared"
    """A prompt once, then its distinct responses; groups share rows that are alike in length."""
    PACKED = "packed"
    """All groups in one long row, for kernels that skip the empty blocks of the mask."""
    PADDED = "padded"
    """One sequence a row, right-padded: right for every causal architecture."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoringBatch:
    """Token ids, what may see what, which tokens are scored, and which side each scored token belongs to.

    Attributes:
        layout: How the rows are laid out; ``PADDED`` rows are plainly causal and need no mask.
        input_ids_RT: int64; padding holds id 0, which nothing reads.
        position_ids_RT: int64; restarts after the prompt for every response of a group.
        segment_RT: int32; the prompt or response a token lies in, counted within its row; -1 for padding.
        trunk_RT: int32; the segment of that token's prompt. A token sees the earlier tokens of its row that lie in
            its own segment or in its trunk.
        scored_positions_N: int64; flat index into R*T of the token that predicts each scored token. The last prompt
            token predicts the first token of every response, so it may stand here several times.
        target_ids_N: int64; the scored tokens themselves.
        token_index_M: int64; into N.
        side_M: int64; into S: chosen sides are 0..B-1, rejected sides B..2B-1.
        common_M: bool; within the first min(chosen, rejected) scored tokens of its side.
        tokens_S: int64; scored tokens of each side.
        num_pairs: B.
        num_tokens: Tokens processed, padding excluded; a prompt that is computed once counts once.
        num_attended: (query, key) couples that a full attention layer has to visit.
        longest_sequence: Tokens of the longest prompt plus response.
    """

    layout: Layout
    input_ids_RT: Tensor
    position_ids_RT: Tensor
    segment_RT: Tensor
    trunk_RT: Tensor
    scored_positions_N: Tensor
    target_ids_N: Tensor
    token_index_M: Tensor
    side_M: Tensor
    common_M: Tensor
    tokens_S: Tensor
    num_pairs: int
    num_tokens: int
    num_attended: int
    longest_sequence: int

    @property
    def num_scored(self) -> int:
        """N: positions that go through the vocabulary head."""
        return self.target_ids_N.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ScoringBatch:
        """The same batch with its tensors on ``device``."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ScoringBatch:
        """The same batch in page-locked memory, from which it can move to a GPU while that computes."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> ScoringBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


class PairLogps(NamedTuple):
    """What scoring a batch gives; sums are float64 over fp32 token logps, in nats.

    A named tuple, not a dataclass: DeepSpeed's hooks look for tensors in tuples, lists and dicts only.

    Attributes:
        chosen_logps_B: Sum over the scored tokens of the chosen side.
        rejected_logps_B: The same of the rejected side.
        chosen_common_logps_B: Sum over the first min(chosen, rejected) scored tokens of the chosen side.
        rejected_common_logps_B: The same of the rejected side.
        chosen_tokens_B: int64; scored tokens of the chosen side.
        rejected_tokens_B: int64; scored tokens of the rejected side.
        token_logps_N: float32; one value a scored token, see :class:`ScoringBatch` for which.
        aux_loss: Load-balancing loss of the batch, where it was asked for.
    """

    chosen_logps_B: Tensor
    rejected_logps_B: Tensor
    chosen_common_logps_B: Tensor
    rejected_common_logps_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    token_logps_N: Tensor
    aux_loss: Tensor | None

    @property
    def stacked_sums(self) -> Tensor:
        """The four sums of each pair in the order of ``VALUE_COLUMNS``, shape (B, 4)."""
        return torch.stack(
            (self.chosen_logps_B, self.rejected_logps_B, self.chosen_common_logps_B, self.rejected_common_logps_B),
            dim=1,
        )


def reduce_token_logps(token_logps_N: Tensor, batch: ScoringBatch, *, aux_loss: Tensor | None = None) -> PairLogps:
    """Sum token logps into sides; differentiable."""
    logps_M = token_logps_N.double()[batch.token_index_M]
    zeros_S = logps_M.new_zeros(2 * batch.num_pairs)
    logps_S = zeros_S.index_add(0, batch.side_M, logps_M)
    common_S = zeros_S.index_add(0, batch.side_M, logps_M * batch.common_M)
    chosen, rejected = slice(None, batch.num_pairs), slice(batch.num_pairs, None)
    return PairLogps(
        chosen_logps_B=logps_S[chosen],
        rejected_logps_B=logps_S[rejected],
        chosen_common_logps_B=common_S[chosen],
        rejected_common_logps_B=common_S[rejected],
        chosen_tokens_B=batch.tokens_S[chosen],
        rejected_tokens_B=batch.tokens_S[rejected],
        token_logps_N=token_logps_N,
        aux_loss=aux_loss,
    )


def token_logps_of_sides(token_logps_N: Tensor, batch: ScoringBatch) -> list[Tensor]:
    """The scored tokens' logps of each of the S sides, in reading order."""
    return list(torch.split(token_logps_N[batch.token_index_M], batch.tokens_S.tolist()))

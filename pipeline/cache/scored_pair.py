"""A scored pair: token ids, what the reference says of them, and which values no reference can have given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..data.token_pair import TokenPair

VALUE_COLUMNS = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_chosen_common_logps",
    "ref_rejected_common_logps",
)
COMMON_COLUMNS = VALUE_COLUMNS[2:]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredPair:
    """One row of a cache: the ids that were scored and what the reference says of them.

    Attributes:
        key: :func:`~.example_key.example_key` of ``pair``, 32 bytes.
        pair: The token ids and scored mask.
        ref_chosen_logps: Sum of the reference's log-probabilities (nats) over the chosen side's scored tokens.
        ref_rejected_logps: The same for the rejected side.
        ref_chosen_common_logps: Sum over the first ``min(chosen_tokens, rejected_tokens)`` scored tokens only; NaN
            where it is not known, in imported rows.
        ref_rejected_common_logps: The same for the rejected side.
        chosen_tokens: How many tokens of the chosen side are scored.
        rejected_tokens: How many of the rejected side.
        chosen_token_logps: The chosen side's value per scored token in order, shape (chosen_tokens,), if kept.
        rejected_token_logps: The rejected side's, shape (rejected_tokens,), if kept.
    """

    key: bytes
    pair: TokenPair
    ref_chosen_logps: float
    ref_rejected_logps: float
    ref_chosen_common_logps: float
    ref_rejected_common_logps: float
    chosen_tokens: int
    rejected_tokens: int
    chosen_token_logps: npt.NDArray[np.float32] | None = None
    rejected_token_logps: npt.NDArray[np.float32] | None = None


def unusable_values(values: Mapping[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.bool_]:
    """Which rows hold a value no reference can have given.

    A sum of log-probabilities is finite and below zero; exactly zero is what a missing value looks like. The
    sums over the common part may be zero: they can stand for a single token the reference was sure of. And they may
    be NaN, which means that nobody knows them: imported rows come with whole sums alone. Scoring cannot make one
    NaN without the whole sum, which is over the same tokens and more.
    """
    unusable = np.zeros(len(values[VALUE_COLUMNS[0]]), dtype=np.bool_)
    for name in VALUE_COLUMNS:
        value = values[name]
        if name in COMMON_COLUMNS:
            unusable |= ~np.isnan(value) & ~(np.isfinite(value) & (value <= 0))
        else:
            unusable |= ~(np.isfinite(value) & (value < 0))
    return unusable

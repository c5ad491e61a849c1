"""A scored pair: token ids, what the reference says of them, and which values are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..data.token_pair import TokenPair
from .example_key import MAX_NAMED_KEYS, Keys, key_at

VALUE_COLUMNS = (
    "ref_chosen_logps",
    "ref_rejected_logps",
    "ref_chosen_common_logps",
    "ref_rejected_common_logps",
)
COMMON_COLUMNS = VALUE_COLUMNS[2:]
PairValues = Mapping[str, npt.NDArray[np.float64]]
"""The columns of :data:`VALUE_COLUMNS`, of the same pairs in the same order."""

NO_FINITE_LOGPS = "no-finite-logps"
PROBABILITY_ONE = "probability-one"
_MEANINGS = {
    NO_FINITE_LOGPS: "pairs have no finite log-probability below zero",
    PROBABILITY_ONE: "pairs have a log-probability of exactly 0.0, that is probability 1 for every scored token, "
    "which a model that is right hardly ever gives",
}


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

    @property
    def has_token_logps(self) -> bool:
        """Whether the values per token are kept, which they are for both sides or for neither."""
        return self.chosen_token_logps is not None and self.rejected_token_logps is not None


def values_of(rows: Sequence[ScoredPair]) -> dict[str, npt.NDArray[np.float64]]:
    """The values of some rows as columns."""
    return {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in VALUE_COLUMNS}


def whole_values(chosen: npt.NDArray[np.float64], rejected: npt.NDArray[np.float64]) -> PairValues:
    """Whole sums alone, as columns: those over the common part are not known."""
    unknown = np.full(len(chosen), np.nan)
    return dict(zip(VALUE_COLUMNS, (chosen, rejected, unknown, unknown), strict=True))


def unusable_values(values: PairValues) -> npt.NDArray[np.bool_]:
    """Which rows hold a value that is refused.

    A sum of log-probabilities is finite and below zero. Exactly zero would mean the probability 1 for every scored
    token: rounding can make that of a model that is very sure, but mostly it is what a missing value looks like. The
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


def unusable_reasons(values: PairValues) -> dict[str, npt.NDArray[np.bool_]]:
    """For each reason, which rows :func:`unusable_values` refuses for it: a row has one at most."""
    nearly = {name: np.where(value == 0, -1.0, value) for name, value in values.items()}
    not_finite = unusable_values(nearly)
    return {NO_FINITE_LOGPS: not_finite, PROBABILITY_ONE: unusable_values(values) & ~not_finite}


def unusable_in_words(keys: Keys, values: PairValues) -> str:
    """How many of these pairs are refused for which reason, and the first of them with their values.

    Args:
        keys: At least one of them is of a pair that :func:`unusable_values` refuses.
        values: The columns of :data:`VALUE_COLUMNS`, in the same order.
    """
    return "; ".join(
        f"{int(rows.sum())} {_MEANINGS[reason]}: {_named(keys, values, np.flatnonzero(rows))}"
        for reason, rows in unusable_reasons(values).items()
        if rows.any()
    )


def _named(keys: Keys, values: PairValues, rows: npt.NDArray[np.int64]) -> str:
    chosen, rejected = (values[name] for name in VALUE_COLUMNS[:2])
    named = [
        f"{key_at(keys, row).hex()} (chosen {chosen[row]:g}, rejected {rejected[row]:g})"
        for row in rows[:MAX_NAMED_KEYS].tolist()
    ]
    return ", ".join([*named, *(["…"] if len(rows) > MAX_NAMED_KEYS else [])])

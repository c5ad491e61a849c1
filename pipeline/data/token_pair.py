"""One preference pair as token ids: what is scored, and all that a key is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
ScoredMask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenPair:
    """The token ids of one pair, after templating and truncation.

    The sequences that a model reads are ``prompt_ids + chosen_ids`` and ``prompt_ids + rejected_ids``.

    Attributes:
        prompt_ids: Tokens both sides share, at least one (the first scored token needs a predecessor).
        chosen_ids: Tokens of the preferred answer, at least one.
        rejected_ids: Tokens of the other answer, at least one.
        scored_mask: Which tokens count, over ``prompt_ids + chosen_ids + rejected_ids`` laid end to end; None
            for the common case: no prompt token, every completion token. The very first prompt token can never
            be scored. Scored prompt tokens (``--mask all-turns``) count on both sides.
    """

    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    scored_mask: ScoredMask | None = None

    @property
    def prompt_scored(self) -> ScoredMask:
        """Which prompt tokens are scored, shape (prompt length,)."""
        if self.scored_mask is None:
            return np.zeros(len(self.prompt_ids), dtype=np.bool_)
        return self.scored_mask[: len(self.prompt_ids)]

    @property
    def chosen_scored(self) -> ScoredMask:
        """Which chosen tokens are scored, shape (chosen length,)."""
        if self.scored_mask is None:
            return np.ones(len(self.chosen_ids), dtype=np.bool_)
        start = len(self.prompt_ids)
        return self.scored_mask[start : start + len(self.chosen_ids)]

    @property
    def rejected_scored(self) -> ScoredMask:
        """Which rejected tokens are scored, shape (rejected length,)."""
        if self.scored_mask is None:
            return np.ones(len(self.rejected_ids), dtype=np.bool_)
        return self.scored_mask[len(self.prompt_ids) + len(self.chosen_ids) :]

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of the chosen side, the denominator of ``dpo_norm``."""
        return int(self.prompt_scored.sum() + self.chosen_scored.sum())

    @property
    def rejected_tokens(self) -> int:
        """Scored tokens of the rejected side."""
        return int(self.prompt_scored.sum() + self.rejected_scored.sum())

    @property
    def shared_prefix_tokens(self) -> int:
        """Tokens a prefix-shared row spends on this pair: the prompt once, then both answers."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def canonical_scored_mask(pair: TokenPair) -> ScoredMask | None:
    """The pair's mask, or None where it only says what None says."""
    mask = pair.scored_mask
    if mask is None:
        return None
    assert len(mask) == pair.shared_prefix_tokens
    prompt_length = len(pair.prompt_ids)
    return None if mask[prompt_length:].all() and not mask[:prompt_length].any() else mask

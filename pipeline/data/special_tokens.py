"""The bos and the eos of a tokenizer: written around plain text, and found where a template wrote them twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DpoCacheError
from .token_pair import TokenIds


class SpecialTokens:
    """What one tokenizer begins and ends a text with.

    Args:
        tokenizer: A tokenizer of ``transformers``.
        name: Its folder or Hub id, for messages.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self._before_text = self._tokens_before_plain_text()

    def around_text(
        self, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds
    ) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Plain text with what the tokenizer itself begins it with, and an eos at the end of each answer.

        An answer that has its eos already, as in data made for other trainers, gets no second one.

        Raises:
            DpoCacheError: The tokenizer has no eos.
        """
        if self.eos is None:
            raise DpoCacheError(
                f"the tokenizer {self._name} has no eos, and plain text responses end with one",
                next_step="set eos_token in its tokenizer_config.json, or use a dataset of messages",
            )
        end = np.asarray([self.eos], dtype=np.int32)
        chosen, rejected = (
            answer if np.array_equal(answer[-1:], end) else np.concatenate([answer, end])
            for answer in (chosen, rejected)
        )
        return np.concatenate([self._before_text, prompt]), chosen, rejected

    def begins_twice(self, ids: TokenIds) -> bool:
        """Whether the first two tokens are bos."""
        return self.bos is not None and len(ids) > 1 and bool(ids[0] == self.bos and ids[1] == self.bos)

    def ends_twice(self, ids: TokenIds) -> bool:
        """Whether the last two tokens are eos, leaving aside white space that a template writes behind it."""
        if self.eos is None:
            return False
        last = np.flatnonzero(ids == self.eos)[-2:]
        if len(last) < 2 or last[1] != last[0] + 1:
            return False
        behind = ids[last[1] + 1 :].tolist()
        return not behind or not self._tokenizer.decode(behind).strip()

    def _tokens_before_plain_text(self) -> TokenIds:
        """What the tokenizer writes in front of plain text: its bos, mostly."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
        return np.asarray(marked[:start], dtype=np.int32)

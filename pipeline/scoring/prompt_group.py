"""Trees: a prompt and responses that branch off its end; and the pairs that share a prompt as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..data.token_pair import TokenIds, TokenPair


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tree:
    """A prompt and the responses that branch off its last token; none at all are allowed."""

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt once and of each response."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses), default=0)

    @property
    def num_attended(self) -> int:
        """Couples (query, key) that the tree mask lets through."""
        prompt = len(self.prompt_ids)
        return _causal_couples(prompt) + sum(
            len(response) * prompt + _causal_couples(len(response)) for response in self.responses
        )


def _causal_couples(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptGroup(Tree):
    """The pairs that share a prompt, as the tree of their distinct responses, in order of first appearance.

    Attributes:
        pairs: Indices of the group's pairs in the sequence that was grouped.
        chosen: For each of ``pairs``, its chosen response as an index into ``responses``.
        rejected: The same for its rejected response.
    """

    pairs: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def group_by_prompt(pairs: Sequence[TokenPair]) -> list[PromptGroup]:
    """Group pairs by their prompt's tokens, in order of first appearance."""
    members: dict[bytes, list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(pair.prompt_ids.tobytes(), []).append(index)
    return [prompt_group(pairs, indices) for indices in members.values()]


def prompt_group(pairs: Sequence[TokenPair], indices: Iterable[int]) -> PromptGroup:
    """The group of the pairs at ``indices``, which must share their prompt."""
    indices = tuple(indices)
    number_of: dict[bytes, int] = {}
    responses: list[TokenIds] = []

    def number(response_ids: TokenIds) -> int:
        known = number_of.setdefault(response_ids.tobytes(), len(responses))
        if known == len(responses):
            responses.append(response_ids)
        return known

    sides = [(number(pairs[index].chosen_ids), number(pairs[index].rejected_ids)) for index in indices]
    return PromptGroup(
        prompt_ids=pairs[indices[0]].prompt_ids,
        responses=tuple(responses),
        pairs=indices,
        chosen=tuple(chosen for chosen, _ in sides),
        rejected=tuple(rejected for _, rejected in sides),
    )

"""Pairs that share a prompt, with each distinct response named once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..data.token_pair import TokenIds, TokenPair


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptGroup:
    """One prompt and the distinct responses of the pairs that share it.

    Attributes:
        prompt_ids: The shared prompt.
        responses: Distinct responses, in order of first appearance.
        pairs: Indices of the group's pairs in the sequence that was grouped.
        chosen: For each of ``pairs``, its chosen response as an index into ``responses``.
        rejected: The same for its rejected response.
    """

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]
    pairs: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt once and of each distinct response."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prompt and the longest response."""
        return len(self.prompt_ids) + max(map(len, self.responses))


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

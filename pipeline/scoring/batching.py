"""Which pairs are scored together: pure functions over token lengths.

A budget is in tokens as they are computed, since that is what memory follows: each prompt once where it is shared, and
padding where every sequence has a row of its own. (Rows of shared prompts are padded too, by a few percent.) Batches
come longest first, so that running out of memory shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.token_pair import TokenPair
from .bin_packing import best_fit
from .prompt_group import PromptGroup, group_by_prompt, prompt_group
from .scoring_batch import Layout
from .shape_rounding import rounded_up

CPU_FILL_TOKENS = 512
"""Batches of more than this only fall out of a CPU's caches: one prompt group is work enough for its cores."""


def plan_batches(
    pairs: Sequence[TokenPair], layout: Layout, *, tokens_per_batch: int, fill_tokens: int | None = None
) -> list[list[int]]:
    """Split pairs into batches, every pair in exactly one, pairs of one prompt together as far as the budget goes.

    Args:
        pairs: What is to be scored.
        layout: The layout the batches will have.
        tokens_per_batch: Budget of a batch. A pair that is longer alone gets a batch of its own.
        fill_tokens: Prompt groups are put together only up to this many tokens; None for the budget. Below the
            budget it makes batches smaller without splitting a group, whose shared responses would then be scored
            more than once.

    Returns:
        For each batch the indices of its pairs, the batch with the longest row first.
    """
    groups = [
        part
        for group in group_by_prompt(pairs)
        for part in split_group(group, pairs, layout, tokens_per_batch=tokens_per_batch)
    ]
    fill_tokens = min(fill_tokens or tokens_per_batch, tokens_per_batch)
    if layout is Layout.PADDED:
        batches = _fill_rectangles(groups, fill_tokens)
    else:
        batches = best_fit([group.num_tokens for group in groups], fill_tokens)
    return [[pair for number in batch for pair in groups[number].pairs] for batch in batches]


def split_group(
    group: PromptGroup, pairs: Sequence[TokenPair], layout: Layout, *, tokens_per_batch: int
) -> list[PromptGroup]:
    """Parts of a group that keep within the budget, in order; a pair is never split."""
    if _computed_tokens(group, layout) <= tokens_per_batch:
        return [group]
    parts: list[PromptGroup] = []
    part = _Part(group, layout)
    for index, sides in zip(group.pairs, zip(group.chosen, group.rejected, strict=True), strict=True):
        if part.indices and part.computed_tokens_with(sides) > tokens_per_batch:
            parts.append(prompt_group(pairs, part.indices))
            part = _Part(group, layout)
        part.add(index, sides)
    return [*parts, prompt_group(pairs, part.indices)]


class _Part:
    """A part of a group as it grows; what it comes to is kept, so that a pair costs the same however many there are."""

    def __init__(self, group: PromptGroup, layout: Layout) -> None:
        self.indices: list[int] = []
        self._group = group
        self._layout = layout
        self._responses: set[int] = set()
        self._num_tokens = self._longest_sequence = len(group.prompt_ids)

    def computed_tokens_with(self, sides: tuple[int, int]) -> int:
        """What :func:`_computed_tokens` would give with one more pair, its responses given by their numbers."""
        lengths = self._new_lengths(sides)
        if self._layout is not Layout.PADDED:
            return self._num_tokens + sum(lengths)
        longest = max([self._longest_sequence, *(len(self._group.prompt_ids) + length for length in lengths)])
        return (len(self._responses) + len(lengths)) * rounded_up(longest)

    def add(self, index: int, sides: tuple[int, int]) -> None:
        lengths = self._new_lengths(sides)
        self._num_tokens += sum(lengths)
        self._longest_sequence = max([self._longest_sequence, *(len(self._group.prompt_ids) + n for n in lengths)])
        self._responses.update(sides)
        self.indices.append(index)

    def _new_lengths(self, sides: tuple[int, int]) -> list[int]:
        return [len(self._group.responses[response]) for response in set(sides) - self._responses]


def _computed_tokens(group: PromptGroup, layout: Layout) -> int:
    return _rectangle([group]) if layout is Layout.PADDED else group.num_tokens


def _fill_rectangles(groups: Sequence[PromptGroup], fill_tokens: int) -> list[list[int]]:
    """Neighbours in length share a batch: hardly any padding, and every batch is as full as the budget lets it."""
    by_length = sorted(range(len(groups)), key=lambda number: -groups[number].longest_sequence)
    batches: list[list[int]] = []
    for number in by_length:
        if batches and _rectangle([groups[member] for member in [*batches[-1], number]]) <= fill_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _rectangle(groups: Sequence[PromptGroup]) -> int:
    """Padded rows times their width."""
    num_rows = sum(len(group.responses) for group in groups)
    return num_rows * rounded_up(max(group.longest_sequence for group in groups))

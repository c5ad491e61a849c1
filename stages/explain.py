"""What a build would find in a cache: which rows it could reuse, and what stands against the others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture_rows import MixtureRows
from ..pipeline.cache.reference_identity import differences
from .building.build_cache import damaged_shards
from .building.build_config import BuildConfig
from .building.build_datasets import collect_datasets, open_datasets
from .building.build_reference import resolve_reference
from .building.pair_collection import CollectedPairs
from .building.row_counts import dropped_in_words
from .building.tokenization_difference import differing_settings
from .console.library_output import quiet_libraries

Difference = tuple[str, Any, Any]
MAX_RANGES = 8
MAX_VALUE_LETTERS = 66


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReuse:
    """One dataset's rows.

    Attributes:
        dataset: The SPEC as given.
        reused: Rows whose tokens the cache has scored.
        others: Ranges of the other rows' numbers, first and last.
        num_others: How many those are.
    """

    dataset: str
    reused: int
    others: list[tuple[int, int]]
    num_others: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainReport:
    """What a build would reuse, and why not the rest.

    Attributes:
        cache: The cache.
        distinct_pairs: Distinct pairs of the datasets.
        known_pairs: Those whose very tokens the cache has scored.
        reference: Fields of the reference that differ: cached value, this one.
        tokens: For each mixture of the cache whose tokens were made with other settings, the settings that differ.
        sources: The datasets' rows.
        dropped: Rows that make no pair, by reason.
        without_token_logps: Pairs that the cache has without the log-probabilities per token that are asked for.
    """

    cache: Path
    distinct_pairs: int
    known_pairs: int
    reference: list[Difference]
    tokens: dict[str, list[Difference]]
    sources: list[SourceReuse]
    dropped: dict[str, int]
    without_token_logps: int = 0

    @property
    def reused_pairs(self) -> int:
        """Those a build would take: none with another reference, however many are known."""
        return 0 if self.reference else self.known_pairs

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "cache": str(self.cache),
            "distinct_pairs": self.distinct_pairs,
            "pairs_reused": self.reused_pairs,
            "pairs_with_known_tokens": self.known_pairs,
            "pairs_without_token_logps": self.without_token_logps,
            "reference_differs_in": _json_of(self.reference),
            "tokens_differ_in": {name: _json_of(fields) for name, fields in self.tokens.items()},
            "sources": [
                {
                    "dataset": source.dataset,
                    "rows_reused": 0 if self.reference else source.reused,
                    "rows_with_known_tokens": source.reused,
                    "rows_unknown": source.others,
                }
                for source in self.sources
            ],
            "dropped": self.dropped,
        }

    def text(self) -> str:
        """For an 80-column terminal."""
        lines = [f"reused     {self.reused_pairs:,} of {self.distinct_pairs:,} distinct pairs"]
        for source in self.sources:
            lines.append(f"           {source.dataset}")
            lines.append(f"             {source.reused:,} rows have tokens that are in the cache")
            if source.others:
                lines.append(
                    f"             {source.num_others:,} rows have other tokens: rows {_ranges_in_words(source.others)}"
                )
        if self.dropped:
            lines.append(f"no pair    {dropped_in_words(self.dropped)}")
        lines += self._reasons()
        return "\n".join(lines)

    def _reasons(self) -> Iterator[str]:
        if self.reference:
            yield "reference  another one; these fields differ:"
            yield from _in_lines(self.reference)
            yield "           a build with it needs a --cache folder of its own"
        else:
            yield "reference  the cache's own"
        for name, fields in self.tokens.items():
            yield f"tokens     made with other settings than those of mixture {name}:"
            yield from _in_lines(fields)
        if self.without_token_logps:
            yield f"values     {self.without_token_logps:,} pairs are in the cache without log-probabilities per token"
        if not self.tokens and self.known_pairs + self.without_token_logps < self.distinct_pairs:
            yield "tokens     made with the cache's settings: the other pairs are new to it"


def explain(config: BuildConfig) -> ExplainReport:
    """Resolve a build's reference and tokenise its rows, and compare both with the cache; nothing is written to it.

    Args:
        config: The build; its cache must be there.

    Raises:
        DpoCacheError: There is no cache, or the model or a dataset cannot be read.
    """
    quiet_libraries()
    cache = ReferenceCache.open(config.cache)
    reference = resolve_reference(config)
    damaged = damaged_shards(cache)
    known = cache.shards.key_index(without=damaged, with_token_logps=config.token_logps)
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as scratch:
        collected = collect_datasets(config, reference, open_datasets(config), known=known, scratch=Path(scratch))
    content = collected.content
    is_known = known.find(content.rows.example_keys) >= 0
    tokens = {
        name: _token_differences(cache.read_mixture(name).tokenization, content.tokenization)
        for name in cache.mixture_names()
    }
    return ExplainReport(
        cache=config.cache,
        distinct_pairs=collected.num_distinct,
        known_pairs=collected.num_reused,
        reference=differences(cache.identity, reference.identity),
        # Where one mixture was made in the same way, the settings are none of the reasons.
        tokens={name: fields for name, fields in tokens.items() if fields} if all(tokens.values()) else {},
        sources=[
            _source_reuse(dataset, number, content.rows, is_known) for number, dataset in enumerate(config.dataset)
        ],
        dropped=content.dropped,
        without_token_logps=_num_without_token_logps(cache, collected, damaged) if config.token_logps else 0,
    )


def _num_without_token_logps(cache: ReferenceCache, collected: CollectedPairs, damaged: list[Path]) -> int:
    return int((cache.shards.key_index(without=damaged).find(collected.waiting.keys) >= 0).sum())


def _token_differences(cached: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """Settings that differ; where none does, what else can make other tokens.

    That is a template that writes today's date, or a library that renders otherwise than it did.
    """
    if differing := differing_settings(cached, ours):
        return differing
    if cached.get("rendered_example") == ours.get("rendered_example"):
        return []
    before, now = cached.get("libraries") or {}, ours["libraries"]
    return [
        ("rendered_example", cached.get("rendered_example"), ours.get("rendered_example")),
        *((f"libraries.{name}", before.get(name), now[name]) for name in now if before.get(name) != now[name]),
    ]


def _source_reuse(dataset: str, number: int, rows: MixtureRows, is_known: npt.NDArray[np.bool_]) -> SourceReuse:
    is_ours = rows.sources == number
    unknown = np.unique(rows.source_rows[is_ours & ~is_known])
    return SourceReuse(
        dataset=dataset,
        reused=len(np.unique(rows.source_rows[is_ours & is_known])),
        others=_ranges(unknown),
        num_others=len(unknown),
    )


def _ranges(numbers: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges of neighbours, first and last."""
    if not len(numbers):
        return []
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [(int(run[0]), int(run[-1])) for run in runs]


def _ranges_in_words(ranges: list[tuple[int, int]]) -> str:
    named = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges[:MAX_RANGES])
    return named + (f", … ({len(ranges)} ranges; --json has all)" if len(ranges) > MAX_RANGES else "")


def _in_lines(fields: list[Difference]) -> Iterator[str]:
    for name, cached, ours in fields:
        yield f"             {name}"
        yield f"               cached  {_short(cached)}"
        yield f"               yours   {_short(ours)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_LETTERS else f"{text[: MAX_VALUE_LETTERS - 1]}…"


def _json_of(fields: list[Difference]) -> list[dict[str, Any]]:
    return [{"field": name, "cached": cached, "yours": ours} for name, cached, ours in fields]

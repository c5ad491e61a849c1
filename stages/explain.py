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
from .building.left_out import recorded_keys
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
        reused: Rows whose pairs the cache has with all that is asked for.
        known: Rows whose tokens the cache has scored.
        others: Ranges of the numbers of rows with other tokens, first and last.
        num_others: How many those are.
    """

    dataset: str
    reused: int
    known: int
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
        left_out: Distinct pairs that an earlier build left out because of their values, by reason.
        has_mixtures: Whether a mixture says how the cache's tokens were made.
        without_token_logps: Pairs that the cache has without the log-probabilities per token that are asked for.
    """

    cache: Path
    distinct_pairs: int
    known_pairs: int
    reference: list[Difference]
    tokens: dict[str, list[Difference]]
    sources: list[SourceReuse]
    dropped: dict[str, int]
    left_out: dict[str, int]
    has_mixtures: bool
    without_token_logps: int

    @property
    def reused_pairs(self) -> int:
        """Those a build would take: none with another reference, however many are known."""
        return 0 if self.reference else self.known_pairs - self.without_token_logps

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "cache": str(self.cache),
            "distinct_pairs": self.distinct_pairs,
            "pairs_reused": self.reused_pairs,
            "pairs_with_known_tokens": self.known_pairs,
            "pairs_without_token_logps": self.without_token_logps,
            "pairs_left_out": self.left_out,
            "reference_differs_in": _json_of(self.reference),
            "tokens_differ_in": {name: _json_of(fields) for name, fields in self.tokens.items()},
            "sources": [
                {
                    "dataset": source.dataset,
                    "rows_reused": 0 if self.reference else source.reused,
                    "rows_with_known_tokens": source.known,
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
            lines.append(f"             {source.known:,} rows have tokens that are in the cache")
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
        if self.left_out:
            yield f"values     an earlier build left pairs out: {dropped_in_words(self.left_out)}"
        if self.known_pairs + sum(self.left_out.values()) == self.distinct_pairs or self.tokens:
            return
        if self.has_mixtures:
            yield "tokens     made with the cache's settings: the other pairs are new to it"
        else:
            yield "tokens     how the cache's were made is not known: no build has finished"


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
    known = cache.shards.key_index(without=damaged)
    reusable = cache.shards.key_index(without=damaged, with_token_logps=True) if config.token_logps else known
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as scratch:
        collected = collect_datasets(config, reference, open_datasets(config), known=known, scratch=Path(scratch))
    content = collected.content
    mixtures = [cache.read_mixture(name) for name in cache.mixture_names()]
    left_out = recorded_keys(source for mixture in mixtures for source in mixture.sources)
    keys = content.rows.example_keys
    is_known, is_reusable = (index.find(keys) >= 0 for index in (known, reusable))
    is_new = ~is_known & ~np.isin(keys, np.concatenate([keys[:0], *left_out.values()]))
    tokens = {mixture.name: _token_differences(mixture.tokenization, content.tokenization) for mixture in mixtures}
    return ExplainReport(
        cache=config.cache,
        distinct_pairs=collected.num_distinct,
        known_pairs=collected.num_reused,
        reference=differences(cache.identity, reference.identity),
        # Where one mixture was made in the same way, the settings are none of the reasons.
        tokens={name: fields for name, fields in tokens.items() if fields} if all(tokens.values()) else {},
        sources=[
            SourceReuse(
                dataset=dataset,
                reused=len(_rows_of(number, content.rows, is_reusable)),
                known=len(_rows_of(number, content.rows, is_known)),
                others=_ranges(unknown := _rows_of(number, content.rows, is_new)),
                num_others=len(unknown),
            )
            for number, dataset in enumerate(config.dataset)
        ],
        dropped=content.dropped,
        left_out={
            reason: count
            for reason, refused in left_out.items()
            if (count := int(np.isin(collected.waiting.keys, refused).sum()))
        },
        has_mixtures=bool(mixtures),
        without_token_logps=len(np.unique(keys[is_known & ~is_reusable])),
    )


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


def _rows_of(source: int, rows: MixtureRows, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Numbers of the chosen rows of a dataset, ascending."""
    return np.unique(rows.source_rows[(rows.sources == source) & chosen])


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

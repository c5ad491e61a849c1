"""What a build makes of the mixture of its name: new, unchanged, replaced or extended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.mixture_rows import MixtureRows
from .build_config import BuildConfig
from .pair_collection import CollectedPairs


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureContent:
    """What a mixture is to hold.

    Attributes:
        rows: Its training pairs, repeats included.
        tokenization: How their tokens were made.
        sources: Their datasets.
        dropped: Rows that make no pair, by reason.
        is_new: Whether it must be written: the cache has none of this name, a damaged one, one with other pairs,
            or one that names a shard which is gone.
    """

    rows: MixtureRows
    tokenization: dict[str, Any]
    sources: list[dict[str, Any]]
    dropped: dict[str, int]
    is_new: bool

    def without(self, keys: tuple[bytes, ...]) -> MixtureContent:
        """The same without the pairs of these keys, which are counted as dropped."""
        if not keys:
            return self
        gone = np.isin(self.rows.example_keys, np.array(keys, dtype=self.rows.example_keys.dtype))
        return replace(
            self,
            rows=self.rows.take(np.flatnonzero(~gone)),
            dropped={**self.dropped, "no-finite-logps": int(gone.sum())},
        )

    def write(self, cache: ReferenceCache, name: str, *, without: Collection[Path]) -> None:
        """Give the cache a mixture of this name and content, where it has none yet.

        Args:
            cache: The cache, which has all its rows by now.
            name: The mixture's.
            without: Damaged shards: no row of theirs is named, and what named one is written anew.
        """
        if not self.is_new and not without:
            return
        cache.write_mixture(
            name,
            self.rows,
            key_index=cache.shards.key_index(without=without),
            tokenization=self.tokenization,
            sources=self.sources,
            dropped=self.dropped,
        )


def mixture_content(
    cache: ReferenceCache, config: BuildConfig, collected: CollectedPairs, *, warn: Callable[[str], None]
) -> MixtureContent:
    """What the mixture is to hold after this build; ``warn`` tells people that the present one is damaged.

    Raises:
        DpoCacheError: The cache has a mixture of this name with other pairs, and neither ``--replace`` nor
            ``--extend`` says what shall become of it; or ``--extend`` would mix two ways of making tokens.
    """
    content = MixtureContent(
        rows=collected.rows,
        tokenization=collected.tokenization,
        sources=collected.sources,
        dropped=collected.dropped,
        is_new=True,
    )
    if config.mixture not in cache.mixture_names():
        return content
    try:
        existing = cache.read_mixture(config.mixture)
        existing.table.verify()
    except DpoCacheError as error:
        if config.extend:
            raise
        warn(f"warning: mixture {config.mixture} is written anew: {error.found}")
        return content
    is_whole = {shard.file_name for shard in existing.shards} <= {path.name for path in cache.shards.paths()}
    if config.extend:
        extended = _extended(existing, content)
        return replace(extended, is_new=extended.is_new or not is_whole)
    if _same_pairs(existing.rows(), content.rows):
        return replace(content, is_new=not is_whole)
    if config.replace:
        return content
    raise _changed(existing, content, config)


def _extended(existing: Mixture, added: MixtureContent) -> MixtureContent:
    """The existing pairs and those of the added ones that it does not have: repeating the command adds nothing."""
    differing = differing_settings(existing.tokenization, added.tokenization)
    if differing:
        raise DpoCacheError(
            f"mixture {existing.name} was made with other tokens: {in_words(differing)}",
            expected="the same settings for all pairs of a mixture",
            next_step="repeat the command with the mixture's settings, or give these pairs another --mixture",
        )
    old_rows = existing.rows()
    is_added = ~np.isin(added.rows.example_keys, old_rows.example_keys)
    if not is_added.any():
        return MixtureContent(
            rows=old_rows,
            tokenization=existing.tokenization,
            sources=existing.sources,
            dropped=existing.dropped,
            is_new=False,
        )
    shifted = replace(added.rows, sources=added.rows.sources + np.int32(len(existing.sources)))
    return MixtureContent(
        rows=MixtureRows.concatenate([old_rows, shifted.take(np.flatnonzero(is_added))]),
        tokenization=existing.tokenization,
        sources=[*existing.sources, *added.sources],
        dropped=dict(Counter(existing.dropped) + Counter(added.dropped)),
        is_new=True,
    )


def _same_pairs(ours: MixtureRows, theirs: MixtureRows) -> bool:
    return np.array_equal(np.sort(ours.example_keys), np.sort(theirs.example_keys))


def _changed(existing: Mixture, content: MixtureContent, config: BuildConfig) -> DpoCacheError:
    old, new = np.unique(existing.rows().example_keys), np.unique(content.rows.example_keys)
    kept = len(np.intersect1d(old, new))
    differing = differing_settings(existing.tokenization, content.tokenization)
    because = f", because of {in_words(differing)}" if differing else ""
    return DpoCacheError(
        f"mixture {config.mixture} has {existing.num_pairs} training pairs, this build makes {len(content.rows)}: "
        f"{len(new) - kept} are new and {len(old) - kept} are gone{because}",
        expected="the same pairs, or a word on what shall become of the mixture",
        next_step="add --replace to let the name mean these pairs, --extend to add them, or --mixture OTHER; "
        "pairs the cache has scored are reused in any case",
    )


def differing_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields of two tokenizations that decide about ids, with both values; library versions and paths do not."""
    ours, theirs = dict(_deciding_fields(ours)), dict(_deciding_fields(theirs))
    names = sorted(ours.keys() | theirs.keys())
    return [(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]


def in_words(differing: list[tuple[str, Any, Any]]) -> str:
    """Differing fields for a message."""
    return "; ".join(f"{name} (was {_short(was)}, now {_short(now)})" for name, was, now in differing)


def _deciding_fields(tokenization: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    settings = tokenization.get("settings") or {}
    yield from ((name, settings.get(name)) for name in ("max_seq_length", "truncation", "mask"))
    yield "chat_template", (tokenization.get("chat_template") or {}).get("sha256")
    yield "tokenizer", tokenization.get("tokenizer_sha256") or tokenization.get("vocabulary_sha256")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 24 else text

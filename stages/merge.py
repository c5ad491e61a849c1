"""Unite caches that were built in separate folders, such as one a node where nodes share no file system."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from .building.mixture_content import MixtureContent
from .building.mixture_union import canonical_order, united
from .building.tokenization_difference import differing_settings, settings_in_words
from .console.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What a merge brought together.

    Attributes:
        cache: The united cache.
        shards: Shards copied: those that were not there yet.
        pairs: Distinct pairs the cache holds now.
        mixtures: Training pairs of each mixture that was brought or united.
        changed: Those of the mixtures that are new or have new rows.
        warnings: What was left behind.
    """

    cache: str
    shards: int
    pairs: int
    mixtures: dict[str, int]
    changed: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        lines = [f"warning: {warning}" for warning in self.warnings]
        copied = f"after copying {self.shards} shards" if self.shards else "no shard is new"
        lines.append(f"{self.cache}: {self.pairs:,} distinct pairs, {copied}")
        lines += [
            f"mixture {name}: {pairs:,} training pairs{'' if name in self.changed else ', nothing new'}"
            for name, pairs in self.mixtures.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A mixture of one of the caches."""

    cache: ReferenceCache
    mixture: Mixture


def merge(source_paths: Sequence[Path], path: Path) -> MergeReport:
    """Copy the shards of all sources into one cache and unite mixtures of one name.

    The united mixture has the rows of all parts, the same that one build of all the parts' datasets would have,
    whatever the order of the sources: a dataset that stands in several parts counts once, so merging again changes
    nothing.

    Args:
        source_paths: The caches to bring in; they stay as they are.
        path: The cache to bring them into; made, as the first source is, if there is none.

    Raises:
        DpoCacheError: A source is of another reference (naming the fields that differ), lacks a shard that a mixture
            of it needs, or made the tokens of a mixture in another way than its namesake.
    """
    sources = [ReferenceCache.open(source) for source in {path.resolve(): path for path in source_paths}.values()]
    for source in sources:
        _require_reference_of(sources[0], source)
    parts = [
        _Part(cache=source, mixture=source.read_mixture(name)) for source in sources for name in source.mixture_names()
    ]
    # Before there is a folder: parts that do not fit together leave none behind.
    for of_name in _parts_by_name(ReferenceCache.planned(path, sources[0].description), parts).values():
        _require_same_tokens(of_name)
    cache = ReferenceCache.create(path, sources[0].description)
    with ExitStack() as locks:
        for name in sorted({part.mixture.name for part in parts}):
            locks.enter_context(cache.building(name))
        # Once more, as the cache's own mixtures cannot change from here on; nothing is copied yet.
        contents = {name: _united(of_name, cache) for name, of_name in _parts_by_name(cache, parts).items()}
        shards, warnings = 0, _warnings_about_vocabularies(cache, sources)
        for source in sources:
            copied, left = _copy_shards(source, cache)
            shards += copied
            warnings += left
        index = cache.shards.key_index(without=[shard.path for shard in cache.shards.unusable()])
        for name, content in contents.items():
            if content.is_new:
                content.write(cache, name, key_index=index)
    return MergeReport(
        cache=str(path),
        shards=shards,
        pairs=len(index),
        mixtures={name: len(content.rows) for name, content in contents.items()},
        changed=sorted(name for name, content in contents.items() if content.is_new),
        warnings=warnings,
    )


def _require_reference_of(first: ReferenceCache, source: ReferenceCache) -> None:
    try:
        first.require_reference(source.identity)
    except DpoCacheError as error:
        raise DpoCacheError(
            f"{source.path} cannot be merged: {error.found}", next_step="merge the caches of one reference only"
        ) from error


def _parts_by_name(cache: ReferenceCache | None, parts: Sequence[_Part]) -> dict[str, list[_Part]]:
    """Mixtures of one name, with the one that the cache, if there is one, has already."""
    by_name: dict[str, list[_Part]] = {}
    for part in parts:
        name = part.mixture.name
        if name not in by_name:
            by_name[name] = []
            if cache is not None and name in cache.mixture_names():
                by_name[name].append(_Part(cache=cache, mixture=cache.read_mixture(name)))
        by_name[name].append(part)
    return by_name


def _require_same_tokens(parts: Sequence[_Part]) -> None:
    """Refuse parts of one mixture whose tokens were made in different ways."""
    first = parts[0].mixture
    for part in parts[1:]:
        differing = differing_settings(first.tokenization, part.mixture.tokenization)
        if differing:
            raise DpoCacheError(
                f"mixture {first.name} of {part.cache.path} was made with other tokens than that of "
                f"{parts[0].cache.path}: {settings_in_words(differing)}",
                expected="the same settings for all pairs of a mixture",
                next_step="build that part again with the same settings, or under another --mixture name",
            )


def _united(parts: Sequence[_Part], cache: ReferenceCache) -> MixtureContent:
    """The mixture that one build of all the parts' datasets makes, in whatever order the parts were listed."""
    _require_same_tokens(parts)
    contents = [MixtureContent.of(part.mixture) for part in parts]
    whole = united(canonical_order(contents))
    if parts[0].cache is not cache:
        return whole
    before = contents[0]
    num_added = len(whole.rows) - len(before.rows)
    return whole if num_added or len(whole.sources) > len(before.sources) else before


def _copy_shards(source: ReferenceCache, cache: ReferenceCache) -> tuple[int, list[str]]:
    """Copy what is sound and not there yet; what a mixture needs has to be sound."""
    needed = {shard.file_name for name in source.mixture_names() for shard in source.read_mixture(name).shards}
    paths, copied, warnings = source.shards.paths(), 0, []
    with Progress(len(paths), unit="shard", title=f"copy {source.path}") as progress:
        for done, path in enumerate(paths, start=1):
            try:
                copied += cache.shards.import_copy(path)
            except DpoCacheError as error:
                if path.name in needed:
                    raise
                warnings.append(f"not copied: {error.found}")
            progress.reach(done)
    return copied, warnings


def _warnings_about_vocabularies(cache: ReferenceCache, sources: Sequence[ReferenceCache]) -> list[str]:
    return [
        f"{source.path} was built with another vocabulary: the same ids may stand for other words"
        for source in sources
        if source.vocabulary_sha256 != cache.vocabulary_sha256
    ]

"""What a cache holds, from its pointers alone: quick at any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.reference_identity import ReferenceIdentity
from ..pipeline.cache.remote_cache import distinct_shards, num_bytes
from ..pipeline.data.printable_text import one_line
from .addresses.local_copy import glance
from .addresses.location import Location, is_address
from .building.row_counts import dropped_in_words, source_in_words, truncated_in_words, truncated_rows
from .console.byte_size import byte_size
from .console.counted_noun import counted
from .hub.recorded_reference import RecordedReference


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """A cache at a glance.

    Attributes:
        path: The folder or the address.
        reference_id: Digest of the reference's identity.
        identity: What the digest is made of.
        recorded: Names and versions beside it.
        shards: Number of shard files; at an address, of those that a mixture names.
        shard_bytes: Their bytes together.
        mixtures: The mixtures by name.
    """

    path: Location
    reference_id: str
    identity: ReferenceIdentity
    recorded: dict[str, Any]
    shards: int
    shard_bytes: int
    mixtures: dict[str, Mixture]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "path": str(self.path),
            "reference_id": self.reference_id,
            "identity": self.identity.to_json(),
            "recorded": self.recorded,
            "shards": self.shards,
            "shard_bytes": self.shard_bytes,
            "mixtures": {name: _mixture_json(mixture) for name, mixture in self.mixtures.items()},
        }

    def text(self) -> str:
        """For an 80-column terminal."""
        identity = self.identity
        reference = RecordedReference.of(self.recorded)
        at_commit = f" @ {reference.commit[:12]}" if reference.commit else ""
        lines = [
            f"cache      {self.path}",
            f"reference  {reference.name}{at_commit}",
            *([f"           with the adapter {reference.adapter}"] if reference.adapter else []),
            f"           id {self.reference_id[:16]}…  weights {identity.weights_sha256[:16]}…",
            f"           {identity.precision}, attention {identity.attention}",
            *_imported_lines(self.recorded),
            f"shards     {counted(self.shards, 'file')}, {byte_size(self.shard_bytes)}",
        ]
        for mixture in self.mixtures.values():
            lines += _mixture_lines(mixture)
        if not self.mixtures:
            lines.append("mixtures   none: no build has finished")
        return "\n".join(map(one_line, lines))


def cache_info(location: Location) -> CacheReport:
    """Read what a cache says of itself; no row is read and nothing is verified.

    Raises:
        DpoCacheError: There is no cache, or a pointer is damaged.
    """
    with glance(location) as folder:
        cache = ReferenceCache.open(folder)
        mixtures = {name: cache.read_mixture(name) for name in cache.mixture_names()}
        if is_address(location):
            named = distinct_shards(mixtures.values())
            shards, shard_bytes = len(named), num_bytes(named)
        else:
            paths = cache.shards.paths()
            shards, shard_bytes = len(paths), sum(path.stat().st_size for path in paths)
        return CacheReport(
            path=location,
            reference_id=cache.reference_id,
            identity=cache.identity,
            recorded=cache.recorded,
            shards=shards,
            shard_bytes=shard_bytes,
            mixtures=mixtures,
        )


def _imported_lines(recorded: dict[str, Any]) -> list[str]:
    source = recorded.get("begun_with")
    if not isinstance(source, dict):
        return []
    return [f"           begun with values imported from {source.get('name')} ({source.get('from')})"]


def _mixture_json(mixture: Mixture) -> dict[str, Any]:
    return {
        "digest": mixture.digest,
        "pairs": mixture.num_pairs,
        "distinct_pairs": mixture.num_distinct_pairs,
        "tokens": mixture.num_ids,
        "dropped": mixture.dropped,
        "truncated": truncated_rows(mixture.sources),
        "sources": mixture.sources,
        "tokenization": mixture.tokenization,
        "shards": len(mixture.shards),
        "token_logps": mixture.has_token_logps,
    }


def _mixture_lines(mixture: Mixture) -> list[str]:
    settings = mixture.settings
    tokens = sum(mixture.num_ids.values())
    truncated = truncated_rows(mixture.sources)
    distinct = "" if mixture.num_distinct_pairs == mixture.num_pairs else f" ({mixture.num_distinct_pairs:,} distinct)"
    return [
        f"mixture    {mixture.name}",
        f"           {mixture.num_pairs:,} pairs{distinct}, {tokens:,} tokens, "
        f"{tokens / mixture.num_pairs:,.0f} a pair",
        f"           max length {settings.get('max_seq_length')}, {settings.get('truncation')}, {settings.get('mask')}",
        *(["           with the log-probability of each scored token"] if mixture.has_token_logps else []),
        f"           dropped: {dropped_in_words(mixture.dropped) or 'nothing'}",
        *([f"           cut: {truncated_in_words(truncated)}"] if truncated else []),
        *(f"           from {source_in_words(source)}" for source in mixture.sources),
    ]

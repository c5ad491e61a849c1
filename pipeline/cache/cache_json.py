"""``cache.json``: of which reference a cache is, and what stood beside that when the cache was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import DpoCacheError
from .canonical_json import (
    BrokenSealError,
    JsonObject,
    parse_object,
    read_bounded,
    read_sealed_json,
    take,
    write_sealed_json,
)
from .format_version import FORMAT_VERSION, require_format_version
from .reference_identity import ReferenceIdentity

MAX_CACHE_JSON_BYTES = 4 << 20
WRITE_AGAIN = (
    "run the dpo-cache build that made it once more: it writes the file again where the shards are of its reference, "
    "and keeps them; or restore the file from a copy"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDescription:
    """What a cache says of itself.

    Attributes:
        identity: Which reference, under which numerics, its values are of.
        vocabulary_sha256: The vocabulary of the first build's tokenizer.
        recorded: What stood beside the identity when the cache was made: names, revisions, versions.
    """

    identity: ReferenceIdentity
    vocabulary_sha256: str
    recorded: JsonObject


def write_description(cache_path: Path, description: CacheDescription) -> None:
    """Write a cache's ``cache.json``."""
    write_sealed_json(
        cache_path / "cache.json",
        {
            "format_version": FORMAT_VERSION,
            "reference_id": description.identity.digest,
            "identity": description.identity.to_json(),
            "vocabulary_sha256": description.vocabulary_sha256,
            "recorded": description.recorded,
        },
        temporary_folder=cache_path / "tmp",
    )


def read_description(cache_path: Path) -> CacheDescription:
    """Read a cache's ``cache.json``.

    Raises:
        DpoCacheError: It is missing or damaged, of another format version, or contradicts itself.
    """
    source = cache_path / "cache.json"
    try:
        described = read_sealed_json(source, max_bytes=MAX_CACHE_JSON_BYTES)
    except BrokenSealError as error:
        raise BrokenSealError(error.found, next_step=WRITE_AGAIN) from error
    require_format_version(described.get("format_version"), source)
    identity = ReferenceIdentity.from_json(take(described, "identity", dict, source=source), source=source)
    if described.get("reference_id") != identity.digest:
        raise DpoCacheError(f"{source}: 'reference_id' is not the digest of 'identity'")
    return CacheDescription(
        identity=identity,
        vocabulary_sha256=take(described, "vocabulary_sha256", str, source=source),
        recorded=take(described, "recorded", dict, source=source),
    )


def has_description(cache_path: Path) -> bool:
    """Whether there is a ``cache.json`` with the bytes that were written."""
    if not (cache_path / "cache.json").exists():
        return False
    try:
        read_sealed_json(cache_path / "cache.json", max_bytes=MAX_CACHE_JSON_BYTES)
    except BrokenSealError:
        return False
    return True


def salvaged_identity(cache_path: Path) -> ReferenceIdentity | None:
    """What a damaged ``cache.json`` says of the reference, where that much of it can still be read.

    Its seal is broken, so it is to be believed only where something sound holds the digest of the identity.
    """
    source = cache_path / "cache.json"
    try:
        described = parse_object(read_bounded(source, max_bytes=MAX_CACHE_JSON_BYTES), source=source)
        return ReferenceIdentity.from_json(take(described, "identity", dict, source=source), source=source)
    except DpoCacheError:
        return None

"""A mixture's pointer ``mixtures/<name>.json``: written last, read with distrust."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import DpoCacheError
from .canonical_json import JsonObject, read_sealed_json, sealed_bytes, take
from .durable_file import settle_folder, write_durably
from .format_version import FORMAT_VERSION, require_format_version
from .mixture import Mixture, check_name
from .mixture_table import MixtureTable
from .shard_file import ShardRef

MAX_POINTER_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def pointer_path(cache_path: Path, name: str) -> Path:
    """Where a mixture's pointer stands, if it does."""
    return cache_path / "mixtures" / f"{name}.json"


def write_pointer(cache_path: Path, mixture: Mixture) -> None:
    """Write a mixture's pointer; everything that it names must be there.

    Raises:
        DpoCacheError: It would be larger than a reader accepts, or the disk refused.
    """
    content = pointer_bytes(mixture)
    if len(content) > MAX_POINTER_BYTES:
        raise DpoCacheError(
            f"the pointer of mixture {mixture.name} would have {len(content):,} bytes",
            expected=f"at most {MAX_POINTER_BYTES:,}",
            next_step="make mixtures of fewer datasets or pairs, under names of their own",
        )
    # A shard of another builder may be visible before it is durable; its name must not be lost once we point at it.
    settle_folder(cache_path / "shards")
    path = pointer_path(cache_path, mixture.name)
    if path.is_file() and path.read_bytes() == content:
        settle_folder(path.parent)
    else:
        write_durably(path, content, temporary_folder=cache_path / "tmp")


def pointer_bytes(mixture: Mixture) -> bytes:
    """A mixture's pointer as it is written: the same bytes for the same mixture."""
    return sealed_bytes(
        {
            "format_version": FORMAT_VERSION,
            "name": mixture.name,
            "digest": mixture.digest,
            "reference_id": mixture.reference_id,
            "num_pairs": mixture.num_pairs,
            "num_distinct_pairs": mixture.num_distinct_pairs,
            "num_ids": mixture.num_ids,
            "block_rows": mixture.block_rows,
            "tokenization": mixture.tokenization,
            "sources": mixture.sources,
            "dropped": mixture.dropped,
            "shards": [[shard.sha256, shard.num_rows, shard.num_bytes] for shard in mixture.shards],
            "table": {"sha256": mixture.table.sha256, "num_bytes": mixture.table.num_bytes},
            **({"token_logps": True} if mixture.has_token_logps else {}),
        }
    )


def read_pointer(cache_path: Path, name: str) -> Mixture:
    """Read and check a mixture's pointer. Its table and shards are not touched.

    Raises:
        DpoCacheError: No such mixture, a damaged pointer, another format version, or an impossible value.
    """
    check_name(name)
    path = pointer_path(cache_path, name)
    pointer = read_sealed_json(path, max_bytes=MAX_POINTER_BYTES)
    require_format_version(pointer.get("format_version"), path)
    if pointer.get("name") != name:
        raise DpoCacheError(f"{path} holds the mixture {str(pointer.get('name'))[:128]!r}, not {name!r}")
    table = take(pointer, "table", dict, source=path)
    num_ids = take(pointer, "num_ids", dict, source=path)
    num_pairs = _positive(pointer, "num_pairs", path)
    block_rows = _positive(pointer, "block_rows", path)
    table_sha256 = _digest(table, "sha256", path)
    return Mixture(
        name=name,
        digest=_digest(pointer, "digest", path),
        reference_id=_digest(pointer, "reference_id", path),
        num_pairs=num_pairs,
        num_distinct_pairs=_positive(pointer, "num_distinct_pairs", path),
        num_ids={side: take(num_ids, side, int, source=path) for side in ("prompt", "chosen", "rejected")},
        block_rows=block_rows,
        tokenization=_tokenization(pointer, path),
        sources=_sources(pointer, path),
        dropped=_counts(pointer, "dropped", path),
        shards=[_shard_ref(entry, path) for entry in take(pointer, "shards", list, source=path)],
        has_token_logps="token_logps" in pointer and take(pointer, "token_logps", bool, source=path),
        table=MixtureTable(
            path=path.parent / f"{table_sha256}.parquet",
            sha256=table_sha256,
            num_bytes=_positive(table, "num_bytes", path),
            num_rows=num_pairs,
            block_rows=block_rows,
        ),
    )


def _shard_ref(entry: object, path: Path) -> ShardRef:
    if isinstance(entry, list) and len(entry) == 3:
        fields_of = dict(zip(("sha256", "num_rows", "num_bytes"), entry, strict=True))
        return ShardRef(
            sha256=_digest(fields_of, "sha256", path),
            num_rows=_positive(fields_of, "num_rows", path),
            num_bytes=_positive(fields_of, "num_bytes", path),
        )
    raise DpoCacheError(f"{path}: an entry of 'shards' is not [sha256, rows, bytes]")


def _positive(value: JsonObject, name: str, path: Path) -> int:
    number = take(value, name, int, source=path)
    if number < 1:
        raise DpoCacheError(f"{path}: {name!r} is {number}", expected="at least 1")
    return number


def _digest(value: JsonObject, name: str, path: Path) -> str:
    digest = take(value, name, str, source=path)
    if not _DIGEST.fullmatch(digest):
        raise DpoCacheError(f"{path}: {name!r} is not a SHA-256 in lower-case hex")
    return digest


def _tokenization(pointer: JsonObject, path: Path) -> JsonObject:
    tokenization = take(pointer, "tokenization", dict, source=path)
    for name in ("settings", "chat_template", "tool_chat_template", "libraries"):
        if not isinstance(tokenization.get(name), dict | None):
            raise DpoCacheError(f"{path}: {name!r} of 'tokenization' must be an object")
    for holder, name in (
        ("settings", "tokenizer"),
        ("settings", "tokenizer_revision"),
        ("chat_template", "name"),
        ("chat_template", "text"),
    ):
        if not isinstance((tokenization.get(holder) or {}).get(name), str | None):
            raise DpoCacheError(f"{path}: {name!r} of {holder!r} must be a text")
    return tokenization


def _sources(pointer: JsonObject, path: Path) -> list[JsonObject]:
    sources = take(pointer, "sources", list, source=path)
    for source in sources:
        if not isinstance(source, dict):
            raise DpoCacheError(f"{path}: 'sources' must hold objects")
        for name in ("dropped", "truncated"):
            if source.get(name) is not None:
                _counts(source, name, path)
    return sources


def _counts(holder: JsonObject, name: str, path: Path) -> JsonObject:
    counts = take(holder, name, dict, source=path)
    for counted in counts:
        take(counts, counted, int, source=path)
    return counts

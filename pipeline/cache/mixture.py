"""A mixture: the ordered training set one build was asked for, and which shard holds each of its pairs.

A pointer ``mixtures/<name>.json``, written last, names a table ``mixtures/<sha256>.parquet`` with one row per
training pair. Shapes: P training pairs, repeats included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .canonical_json import JsonObject, read_sealed_json, sealed_bytes, take
from .durable_file import settle_folder, write_durably
from .example_key import Keys, name_keys
from .format_version import FORMAT_VERSION, require_format_version
from .key_index import KeyIndex
from .mixture_rows import MixtureRows
from .mixture_table import MixtureTable, training_set_digest, write_table
from .parquet_file import KEY_COLUMN
from .shard_file import ShardRef

MAX_POINTER_BYTES = 64 << 20
MIXTURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mixture:
    """A mixture as its pointer describes it; the table is read on demand.

    Attributes:
        name: What ``--mixture`` calls it.
        digest: SHA-256 in hex of the training set itself: its keys in order. It does not depend on which shard
            holds a row, so a cache built by other workers, compacted or refilled has the same mixture.
        reference_id: Reference of the cache it belongs to.
        num_pairs: Training pairs, repeats included.
        num_distinct_pairs: Without repeats.
        num_ids: Token ids of all training pairs: ``prompt``, ``chosen``, ``rejected``.
        block_rows: Pairs of a block.
        tokenization: How the tokens were made.
        sources: The datasets, in the order ``source`` counts them.
        dropped: What was not used and why.
        shards: The shards that hold its rows, in the order ``shard`` counts them: by digest.
        has_token_logps: Whether all of its pairs have log-probabilities per token.
        table: The rows.
    """

    name: str
    digest: str
    reference_id: str
    num_pairs: int
    num_distinct_pairs: int
    num_ids: dict[str, int]
    block_rows: int
    tokenization: JsonObject
    sources: list[JsonObject]
    dropped: JsonObject
    shards: list[ShardRef]
    has_token_logps: bool
    table: MixtureTable

    def shared_prefix_lengths(self) -> npt.NDArray[np.int32]:
        """Token ids of each pair with its prompt once, shape (P,)."""
        total = self.table.column("prompt_length").copy()
        total += self.table.column("chosen_length")
        total += self.table.column("rejected_length")
        return total

    def longest_sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Token ids of each pair's prompt and longer answer, shape (P,)."""
        longest: npt.NDArray[np.int32] = np.maximum(
            self.table.column("chosen_length"), self.table.column("rejected_length")
        )
        longest += self.table.column("prompt_length")
        return longest

    def rows(self) -> MixtureRows:
        """All training pairs as columns, as :func:`write_mixture` takes them.

        Raises:
            DpoCacheError: The table is damaged, or a row of it is of a dataset that the pointer does not list.
        """
        sources = self.table.column("source")
        if not 0 <= sources.min() <= sources.max() < len(self.sources):
            raise DpoCacheError(f"{self.table.path} names a dataset that the pointer {self.name}.json does not list")
        return MixtureRows(
            example_keys=self.table.column(KEY_COLUMN),
            prompt_hashes=self.table.column("prompt_hash"),
            prompt_lengths=self.table.column("prompt_length"),
            chosen_lengths=self.table.column("chosen_length"),
            rejected_lengths=self.table.column("rejected_length"),
            sources=sources,
            source_rows=self.table.column("source_row"),
        )


def write_mixture(
    cache_path: Path,
    name: str,
    rows: MixtureRows,
    *,
    reference_id: str,
    key_index: KeyIndex,
    tokenization: JsonObject,
    sources: list[JsonObject],
    dropped: JsonObject,
) -> Mixture:
    """Write a mixture's table, then its pointer. Rows are put into mixture order here.

    Raises:
        DpoCacheError: A name that is none, no pairs, or pairs that no shard holds, with their count and first
            keys.
    """
    check_name(name)
    if not len(rows):
        raise DpoCacheError(f"mixture {name} would have no pairs")
    rows, repeats = rows.in_mixture_order()
    places = _places(rows.example_keys, key_index, name)
    used, used_numbers = np.unique(key_index.shard_numbers[places], return_inverse=True)
    by_digest = np.argsort([key_index.shards[number].sha256 for number in used.tolist()])
    shards = np.argsort(by_digest)[used_numbers]
    table = write_table(
        cache_path,
        rows,
        repeats=repeats,
        shards=shards.astype(np.int32),
        shard_rows=key_index.rows[places],
        reference_id=reference_id,
    )
    mixture = Mixture(
        name=name,
        digest=training_set_digest(rows.example_keys),
        reference_id=reference_id,
        num_pairs=len(rows),
        num_distinct_pairs=int((repeats == 0).sum()),
        num_ids=rows.num_ids(),
        block_rows=table.block_rows,
        tokenization=tokenization,
        sources=sources,
        dropped=dropped,
        shards=[key_index.shards[number] for number in used[by_digest].tolist()],
        has_token_logps=bool(key_index.has_token_logps[used].all()),
        table=table,
    )
    write_pointer(cache_path, mixture)
    return mixture


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
    path = cache_path / "mixtures" / f"{mixture.name}.json"
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


def read_mixture(cache_path: Path, name: str) -> Mixture:
    """Read and check a mixture's pointer. Its table and shards are not touched.

    Raises:
        DpoCacheError: No such mixture, a damaged pointer, another format version, or an impossible value.
    """
    check_name(name)
    path = cache_path / "mixtures" / f"{name}.json"
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
        dropped=_counts(pointer, path),
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


def check_name(name: str) -> None:
    """Refuse a mixture name that could name anything but one file of the folder.

    Raises:
        DpoCacheError: It could.
    """
    if not MIXTURE_NAME.fullmatch(name):
        raise DpoCacheError(
            f"{name[:128]!r} cannot name a mixture",
            expected="up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )


def _places(keys: Keys, key_index: KeyIndex, name: str) -> npt.NDArray[np.int64]:
    order = np.argsort(keys, kind="stable")
    places = np.empty(len(keys), dtype=np.int64)
    places[order] = key_index.find(keys[order])  # ascending look-ups are many times quicker
    missing = places < 0
    if missing.any():
        raise DpoCacheError(
            f"{int(missing.sum())} pairs of mixture {name} are in no shard: {name_keys(keys[missing])}",
            next_step="run the same dpo-cache build again; it scores only what is missing",
        )
    return places


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
    return tokenization


def _sources(pointer: JsonObject, path: Path) -> list[JsonObject]:
    sources = take(pointer, "sources", list, source=path)
    for source in sources:
        if not isinstance(source, dict):
            raise DpoCacheError(f"{path}: 'sources' must hold objects")
        if source.get("dropped") is not None:
            _counts(source, path)
    return sources


def _counts(holder: JsonObject, path: Path) -> JsonObject:
    dropped = take(holder, "dropped", dict, source=path)
    for reason in dropped:
        take(dropped, reason, int, source=path)
    return dropped

"""A mixture: the ordered training set one build was asked for, and which shard holds each of its pairs.

A pointer ``mixtures/<name>.json``, written last, names a table ``mixtures/<sha256>.parquet`` with one row per
training pair. Shapes: P training pairs, repeats included.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import DpoCacheError
from .canonical_json import JsonObject, read_sealed_json, take, write_sealed_json
from .durable_file import settle_folder, write_durably
from .example_key import KEY_BYTES, KEY_VERSION, Keys, key_at
from .key_index import KeyIndex
from .parquet_file import KEY_COLUMN, ParquetReader, file_sha256, keys_of, numbers_of, parquet_bytes, reading
from .shard_file import FORMAT_VERSION, ShardRef

BLOCK_ROWS = 1024
"""Training pairs of one block: a row group of the table, the grain of shuffled reading."""
MAX_POINTER_BYTES = 64 << 20
MAX_NAMED_KEYS = 10
MIXTURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

TABLE_SCHEMA = pa.schema(
    [
        pa.field(KEY_COLUMN, pa.binary(KEY_BYTES), nullable=False),
        pa.field("repeat", pa.int32(), nullable=False),
        pa.field("prompt_hash", pa.uint64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("chosen_length", pa.int32(), nullable=False),
        pa.field("rejected_length", pa.int32(), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureRows:
    """Training pairs as columns, in any order; a pair that is to appear k times stands k times.

    Attributes:
        example_keys: Shape (P,), ``S32``.
        prompt_hashes: :func:`~.example_key.prompt_hash_prefix` of each prompt, shape (P,).
        prompt_lengths: Token ids of each prompt, shape (P,).
        chosen_lengths: Token ids of each chosen answer, shape (P,).
        rejected_lengths: Token ids of each rejected answer, shape (P,).
        sources: Position of each pair's dataset in the mixture's list of sources, shape (P,).
        source_rows: Row number in that dataset, shape (P,).
    """

    example_keys: Keys
    prompt_hashes: npt.NDArray[np.uint64]
    prompt_lengths: npt.NDArray[np.int32]
    chosen_lengths: npt.NDArray[np.int32]
    rejected_lengths: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int32]
    source_rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.example_keys)

    def take(self, places: npt.NDArray[np.int64]) -> MixtureRows:
        """The pairs at these places, in that order."""
        return MixtureRows(**{column.name: getattr(self, column.name)[places] for column in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[MixtureRows]) -> MixtureRows:
        """All parts, one after another."""
        return MixtureRows(
            **{
                column.name: np.concatenate([getattr(part, column.name) for part in parts])
                for column in fields(MixtureRows)
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureBlock:
    """Consecutive rows of a mixture's table, those that reading the pairs needs. Shape (block rows,) each."""

    keys: Keys
    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    """Prompt, chosen and rejected ids together."""

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.shards.nbytes + self.rows.nbytes + self.lengths.nbytes


@dataclass(kw_only=True, slots=True, eq=False)
class MixtureTable:
    """The table of a mixture, opened and its digest verified when first read."""

    path: Path
    sha256: str
    num_bytes: int
    num_rows: int
    block_rows: int
    _reader: ParquetReader | None = field(default=None, init=False, repr=False)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A whole column, shape (P,); ``example_key`` comes as ``S32``.

        Raises:
            DpoCacheError: The table is missing, damaged or not what the pointer says.
        """
        with reading(self.path):
            column = self._open().read_column(name)
            return keys_of(column) if name == KEY_COLUMN else numbers_of(column)

    def block(self, number: int) -> MixtureBlock:
        """Rows ``number * block_rows`` and following, without the rest of the table in memory."""
        names = (KEY_COLUMN, "shard", "row", "prompt_length", "chosen_length", "rejected_length")
        with reading(self.path):
            table = self._open().read([number], names)
            numbers = {name: numbers_of(table.column(name).chunk(0)) for name in names[1:]}
            return MixtureBlock(
                keys=keys_of(table.column(KEY_COLUMN).chunk(0)),
                shards=numbers["shard"],
                rows=numbers["row"],
                lengths=numbers["prompt_length"].astype(np.int64)
                + numbers["chosen_length"]
                + numbers["rejected_length"],
            )

    def training_set_digest(self) -> str:
        """:func:`training_set_digest` of its keys, a block in memory at a time."""
        digest = _begun_digest(self.num_rows)
        with reading(self.path):
            parquet = self._open()
            for group in range(len(parquet.group_starts)):
                digest.update(keys_of(parquet.read([group], [KEY_COLUMN]).column(0).chunk(0)).data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Check size, digest, schema and blocks now instead of at the first read."""
        self._open()

    def _open(self) -> ParquetReader:
        if self._reader is None:
            if (found := file_sha256(self.path)) != self.sha256:
                raise DpoCacheError(
                    f"{self.path} is damaged: its bytes have the SHA-256 {found}",
                    next_step="build the mixture again; the scored rows are kept",
                )
            reader = ParquetReader(self.path, TABLE_SCHEMA)
            starts = np.arange(len(reader.group_starts)) * self.block_rows
            in_blocks = np.array_equal(reader.group_starts, starts) and reader.group_rows[-1] <= self.block_rows
            if reader.num_rows != self.num_rows or not in_blocks:
                raise DpoCacheError(f"{self.path} does not have the rows or blocks that its pointer states")
            self._reader = reader
        return self._reader


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
    table: MixtureTable

    def shared_prefix_lengths(self) -> npt.NDArray[np.int32]:
        """Token ids of each pair with its prompt once, shape (P,)."""
        total = self.table.column("prompt_length").copy()
        total += self.table.column("chosen_length")
        total += self.table.column("rejected_length")
        return total

    def rows(self) -> MixtureRows:
        """All training pairs as columns, as :func:`write_mixture` takes them."""
        return MixtureRows(
            example_keys=self.table.column(KEY_COLUMN),
            prompt_hashes=self.table.column("prompt_hash"),
            prompt_lengths=self.table.column("prompt_length"),
            chosen_lengths=self.table.column("chosen_length"),
            rejected_lengths=self.table.column("rejected_length"),
            sources=self.table.column("source"),
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

    The order is (repeat number, prompt hash, key): whole passes over the distinct pairs, pairs of one prompt
    side by side, otherwise as good as random, and the same however the datasets were listed.

    Raises:
        DpoCacheError: A name that is none, no pairs, or pairs that no shard holds, with their count and first
            keys.
    """
    check_name(name)
    if not len(rows):
        raise DpoCacheError(f"mixture {name} would have no pairs")
    rows, repeats = _in_mixture_order(rows)
    places = _places(rows.example_keys, key_index, name)
    used, shard = np.unique(key_index.shard_numbers[places], return_inverse=True)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(KEY_BYTES), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows.example_keys))]
        ),
        repeats,
        rows.prompt_hashes,
        shard.astype(np.int32),
        key_index.rows[places],
        rows.prompt_lengths,
        rows.chosen_lengths,
        rows.rejected_lengths,
        rows.sources,
        rows.source_rows,
    ]
    content = parquet_bytes(
        [pa.table([pa.array(column) for column in columns], schema=TABLE_SCHEMA)],
        TABLE_SCHEMA,
        metadata={"dpo_cache.format_version": str(FORMAT_VERSION), "dpo_cache.reference_id": reference_id},
        rows_per_group=BLOCK_ROWS,
    )
    sha256 = hashlib.sha256(content).hexdigest()
    folder = cache_path / "mixtures"
    mixture = Mixture(
        name=name,
        digest=training_set_digest(rows.example_keys),
        reference_id=reference_id,
        num_pairs=len(rows),
        num_distinct_pairs=int((repeats == 0).sum()),
        num_ids={
            "prompt": int(rows.prompt_lengths.sum(dtype=np.int64)),
            "chosen": int(rows.chosen_lengths.sum(dtype=np.int64)),
            "rejected": int(rows.rejected_lengths.sum(dtype=np.int64)),
        },
        block_rows=BLOCK_ROWS,
        tokenization=tokenization,
        sources=sources,
        dropped=dropped,
        shards=[key_index.shards[int(number)] for number in used],
        table=MixtureTable(
            path=folder / f"{sha256}.parquet",
            sha256=sha256,
            num_bytes=content.size,
            num_rows=len(rows),
            block_rows=BLOCK_ROWS,
        ),
    )
    write_durably(mixture.table.path, memoryview(content), temporary_folder=cache_path / "tmp")
    write_pointer(cache_path, mixture)
    return mixture


def write_pointer(cache_path: Path, mixture: Mixture) -> None:
    """Write a mixture's pointer; everything that it names must be there."""
    # A shard of another builder may be visible before it is durable; its name must not be lost once we point at it.
    settle_folder(cache_path / "shards")
    write_sealed_json(
        cache_path / "mixtures" / f"{mixture.name}.json",
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
        },
        temporary_folder=cache_path / "tmp",
    )


def read_mixture(cache_path: Path, name: str) -> Mixture:
    """Read and check a mixture's pointer. Its table and shards are not touched.

    Raises:
        DpoCacheError: No such mixture, a damaged pointer, another format version, or an impossible value.
    """
    check_name(name)
    path = cache_path / "mixtures" / f"{name}.json"
    pointer = read_sealed_json(path, max_bytes=MAX_POINTER_BYTES)
    if pointer.get("format_version") != FORMAT_VERSION:
        raise DpoCacheError(
            f"{path} has format version {str(pointer.get('format_version'))[:20]}",
            expected=f"version {FORMAT_VERSION}",
            next_step="use the dpo-cache that wrote it, or build again",
        )
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
        tokenization=take(pointer, "tokenization", dict, source=path),
        sources=_objects(pointer, "sources", path),
        dropped=take(pointer, "dropped", dict, source=path),
        shards=[_shard_ref(entry, path) for entry in take(pointer, "shards", list, source=path)],
        table=MixtureTable(
            path=path.parent / f"{table_sha256}.parquet",
            sha256=table_sha256,
            num_bytes=_positive(table, "num_bytes", path),
            num_rows=num_pairs,
            block_rows=block_rows,
        ),
    )


def check_name(name: str) -> None:
    """Refuse a mixture name that could name anything but one file of the folder."""
    if not MIXTURE_NAME.fullmatch(name):
        raise DpoCacheError(
            f"{name[:128]!r} cannot name a mixture",
            expected="up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )


def training_set_digest(keys: Keys) -> str:
    """SHA-256 in hex over the key version, the number of keys (8 bytes, little-endian) and the keys in order."""
    digest = _begun_digest(len(keys))
    digest.update(np.ascontiguousarray(keys).data)
    return digest.hexdigest()


def _begun_digest(num_keys: int) -> hashlib._Hash:
    return hashlib.sha256(bytes([KEY_VERSION]) + num_keys.to_bytes(8, "little"))


def name_keys(keys: Keys) -> str:
    """The first few keys in hex, for a message."""
    named = ", ".join(key_at(keys, index).hex() for index in range(min(len(keys), MAX_NAMED_KEYS)))
    return named + (", …" if len(keys) > MAX_NAMED_KEYS else "")


def _in_mixture_order(rows: MixtureRows) -> tuple[MixtureRows, npt.NDArray[np.int32]]:
    """Rows in mixture order, and their repeat numbers: 0 for the first of its key, then 1, …"""
    rows = rows.take(np.lexsort((rows.source_rows, rows.sources, rows.example_keys)))
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = rows.example_keys[1:] != rows.example_keys[:-1]
    starts = np.flatnonzero(first)
    places = np.arange(len(rows))
    repeats = (places - np.repeat(starts, np.diff(np.append(starts, len(rows))))).astype(np.int32)
    order = np.lexsort((rows.prompt_hashes, repeats))  # stable, so equal prompts stay in the order of keys
    return rows.take(order), repeats[order]


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


def _objects(value: JsonObject, name: str, path: Path) -> list[JsonObject]:
    items = take(value, name, list, source=path)
    if not all(isinstance(item, dict) for item in items):
        raise DpoCacheError(f"{path}: {name!r} must hold objects")
    return items

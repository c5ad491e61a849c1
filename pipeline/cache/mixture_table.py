"""The table of a mixture, ``mixtures/<sha256>.parquet``: one row per training pair, and which shard holds it.

Shapes: P training pairs, repeats included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import DpoCacheError
from .digest_named_file import write_digest_named
from .example_key import KEY_BYTES, KEY_VERSION, Keys
from .format_version import FORMAT_VERSION
from .mixture_rows import MixtureRows
from .parquet_file import KEY_COLUMN, ParquetReader, file_sha256, parquet_bytes

BLOCK_ROWS = 1024
"""Training pairs of one block: a row group of the table, the grain of shuffled reading."""

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
class MixtureBlock:
    """Consecutive rows of a mixture's table, those that reading the pairs needs. Shape (block rows,) each."""

    keys: Keys
    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    """Prompt, chosen and rejected ids together."""

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
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
        return self._open().whole_column(name)

    def block(self, number: int) -> MixtureBlock:
        """Rows ``number * block_rows`` and following, without the rest of the table in memory.

        Raises:
            DpoCacheError: As :meth:`column`.
        """
        lengths = ("prompt_length", "chosen_length", "rejected_length")
        columns = self._open().arrays([number], (KEY_COLUMN, "shard", "row", *lengths))
        return MixtureBlock(
            keys=columns[KEY_COLUMN],
            shards=columns["shard"],
            rows=columns["row"],
            lengths=np.sum([columns[name] for name in lengths], axis=0, dtype=np.int64),
        )

    def training_set_digest(self) -> str:
        """:func:`training_set_digest` of its keys, a block in memory at a time."""
        digest = _begun_digest(self.num_rows)
        parquet = self._open()
        for group in range(len(parquet.group_starts)):
            digest.update(parquet.arrays([group], [KEY_COLUMN])[KEY_COLUMN].data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Check digest, schema and blocks now instead of at the first read.

        Raises:
            DpoCacheError: As :meth:`column`.
        """
        self._open()

    def _open(self) -> ParquetReader:
        if self._reader is None:
            if (found := file_sha256(self.path)) != self.sha256:
                raise DpoCacheError(
                    f"{self.path} is damaged: its bytes have the SHA-256 {found[:12]}…",
                    next_step="build the mixture again; the scored rows are kept",
                )
            reader = ParquetReader(self.path, TABLE_SCHEMA)
            starts = np.arange(len(reader.group_starts)) * self.block_rows
            in_blocks = np.array_equal(reader.group_starts, starts) and reader.group_rows[-1] <= self.block_rows
            if reader.num_rows != self.num_rows or not in_blocks:
                raise DpoCacheError(f"{self.path} does not have the rows or blocks that its pointer states")
            self._reader = reader
        return self._reader


def write_table(
    cache_path: Path,
    rows: MixtureRows,
    *,
    repeats: npt.NDArray[np.int32],
    shards: npt.NDArray[np.int32],
    shard_rows: npt.NDArray[np.int32],
    reference_id: str,
) -> MixtureTable:
    """Write the table of a mixture.

    Args:
        cache_path: The cache's folder.
        rows: Training pairs in mixture order.
        repeats: How often each pair's key stood before it, shape (P,).
        shards: Position of each pair's shard in the pointer's list, shape (P,).
        shard_rows: Row number in that shard, shape (P,).
        reference_id: Reference of the cache.

    Raises:
        DpoCacheError: The disk refused.
    """
    keys = pa.py_buffer(np.ascontiguousarray(rows.example_keys))
    columns = {
        KEY_COLUMN: pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(rows), [None, keys]),
        "repeat": repeats,
        "prompt_hash": rows.prompt_hashes,
        "shard": shards,
        "row": shard_rows,
        "prompt_length": rows.prompt_lengths,
        "chosen_length": rows.chosen_lengths,
        "rejected_length": rows.rejected_lengths,
        "source": rows.sources,
        "source_row": rows.source_rows,
    }
    content = parquet_bytes(
        [pa.table([pa.array(columns[name]) for name in TABLE_SCHEMA.names], schema=TABLE_SCHEMA)],
        TABLE_SCHEMA,
        metadata={"dpo_cache.format_version": str(FORMAT_VERSION), "dpo_cache.reference_id": reference_id},
        rows_per_group=BLOCK_ROWS,
    )
    sha256 = hashlib.sha256(content).hexdigest()
    table = MixtureTable(
        path=cache_path / "mixtures" / f"{sha256}.parquet",
        sha256=sha256,
        num_bytes=content.nbytes,
        num_rows=len(rows),
        block_rows=BLOCK_ROWS,
    )
    write_digest_named(table.path, content, temporary_folder=cache_path / "tmp")
    return table


def training_set_digest(keys: Keys) -> str:
    """SHA-256 in hex over the key version, the number of keys (8 bytes, little-endian) and the keys in order."""
    digest = _begun_digest(len(keys))
    digest.update(np.ascontiguousarray(keys).data)
    return digest.hexdigest()


def _begun_digest(num_keys: int) -> hashlib._Hash:
    return hashlib.sha256(bytes([KEY_VERSION]) + num_keys.to_bytes(8, "little"))

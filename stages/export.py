"""Write a mixture as one Parquet file with the columns that TRL's DPOTrainer trains on."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.durable_file import write_durably
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.scored_pair import ScoredPair
from ..pipeline.data.token_pair import canonical_scored_mask
from .console.byte_size import byte_size
from .console.progress import Progress
from .interchange.trl_columns import REFERENCE_ID_KEY, TRL_SCHEMA

ROWS_PER_GROUP = 1024
"""Rows in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        cache: The cache.
        mixture: The mixture's name.
        output: The file.
        pairs: Its rows, in the order of the mixture.
        longest: Tokens of the longest prompt with one answer: TRL must not cut below it.
        num_bytes: Size of the file.
    """

    cache: str
    mixture: str
    output: str
    pairs: int
    longest: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        return "\n".join(
            [
                f"{self.output}: {self.pairs:,} pairs of mixture {self.mixture}, {byte_size(self.num_bytes)}",
                f"longest sequence: {self.longest:,} tokens; in TRL set max_length=None, or at least that: the cached",
                "sums are over whole sequences",
            ]
        )


def export(path: Path, output: Path, *, mixture_name: str) -> ExportReport:
    """Write a mixture in its order; memory holds a thousand rows at a time.

    Args:
        path: The cache; it is only read.
        output: The Parquet file, which must not exist; it becomes visible when it is complete.
        mixture_name: Which mixture.

    Raises:
        DpoCacheError: Something stands at ``output``, the cache is damaged, or a pair scores other tokens than all
            of its answers and no others, which TRL cannot.
    """
    if output.exists():
        raise DpoCacheError(f"{output} exists", expected="a new file", next_step="name another, or remove it")
    if not output.parent.is_dir():
        raise DpoCacheError(f"there is no folder {output.parent}", next_step=f"mkdir -p {as_argument(output.parent)}")
    cache = ReferenceCache.open(path)
    mixture = cache.read_mixture(mixture_name)
    tables = _tables(cache, mixture)
    write_durably(
        output, _parquet_chunks(tables, {REFERENCE_ID_KEY: cache.reference_id}), temporary_folder=output.parent
    )
    return ExportReport(
        cache=str(path),
        mixture=mixture.name,
        output=str(output),
        pairs=mixture.num_pairs,
        longest=_longest_sequence(mixture),
        num_bytes=output.stat().st_size,
    )


def _tables(cache: ReferenceCache, mixture: Mixture) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    with Progress(mixture.num_pairs, unit="pair", title=f"export {mixture.name}") as progress:
        for done, pair in enumerate(cache.pairs(mixture.name), start=1):
            _refuse_mask(pair, mixture)
            rows.append(_row(pair))
            if len(rows) == ROWS_PER_GROUP or done == mixture.num_pairs:
                yield pa.Table.from_pylist(rows, schema=TRL_SCHEMA)
                rows = []
                progress.reach(done)


def _row(pair: ScoredPair) -> dict[str, Any]:
    return {
        "prompt_ids": pair.pair.prompt_ids,
        "chosen_ids": pair.pair.chosen_ids,
        "rejected_ids": pair.pair.rejected_ids,
        "ref_chosen_logps": pair.ref_chosen_logps,
        "ref_rejected_logps": pair.ref_rejected_logps,
    }


def _refuse_mask(pair: ScoredPair, mixture: Mixture) -> None:
    if canonical_scored_mask(pair.pair) is None:
        return
    mask = mixture.settings.get("mask")
    next_step = "build the mixture with --mask last-turn under another --mixture name, and export that"
    if mask == "last-turn":
        next_step = (
            "one of its responses goes on from a thought that the chat template opens, and the other does not: leave "
            "such rows out of the dataset"
        )
    raise DpoCacheError(
        f"the pair {pair.key.hex()} does not score all tokens of its responses and no others (mixture {mixture.name}, "
        f"mask {mask})",
        expected="pairs of which every response token is scored and no other: TRL's collator knows no mask",
        next_step=next_step,
    )


def _longest_sequence(mixture: Mixture) -> int:
    table = mixture.table
    prompts = table.column("prompt_length")
    return int(max((prompts + table.column(f"{side}_length")).max() for side in ("chosen", "rejected")))


def _parquet_chunks(tables: Iterable[pa.Table], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a Parquet file as they come to be, a row group for each table."""
    sink = _Sink()
    with pq.ParquetWriter(sink, TRL_SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            yield sink.taken()
        writer.add_key_value_metadata(metadata)
    yield sink.taken()


class _Sink(io.RawIOBase):
    """A file whose bytes are taken away while it grows."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[bytes] = []
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting.append(bytes(data))
        self._num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self._num_bytes

    def taken(self) -> bytes:
        """What has been written since the last call."""
        waiting, self._waiting = self._waiting, []
        return b"".join(waiting)

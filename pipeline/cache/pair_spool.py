"""Token pairs waiting to be scored: one memory-mapped Arrow file in the cache's ``tmp/``.

Planning a build keeps keys and lengths in memory and nothing else; the tokens of the pairs that are to be scored
wait here, where every worker reads the rows of its unit without a copy of the rest. The file is private to one
build and never part of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from ..data.token_pair import TokenPair
from .durable_file import refused

SPOOL_SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("scored_mask", pa.list_(pa.bool_())),
    ]
)
ROWS_PER_BATCH = 1024


class PairSpoolWriter:
    """Append pairs one after another; memory holds one batch of them.

    Args:
        path: The file to write; it is readable once the writer is closed.

    Raises:
        DpoCacheError: The disk is full, at a later call.
    """

    def __init__(self, path: Path) -> None:
        self.num_pairs = 0
        self._path = path
        self._waiting: list[TokenPair] = []
        self._writer = pa.ipc.new_file(str(path), SPOOL_SCHEMA)

    def append(self, pair: TokenPair) -> None:
        """Add a pair; its index is the number of pairs appended before it."""
        self._waiting.append(pair)
        self.num_pairs += 1
        if len(self._waiting) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        columns = [
            pa.array([getattr(pair, field.name) for pair in self._waiting], type=field.type) for field in SPOOL_SCHEMA
        ]
        try:
            self._writer.write_batch(pa.record_batch(columns, schema=SPOOL_SCHEMA))
        except OSError as error:
            raise refused("write", self._path, error) from error
        self._waiting = []

    def __enter__(self) -> PairSpoolWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._waiting and fault is None:
            self._flush()
        try:
            self._writer.close()
        except OSError as error:
            if fault is None:  # after a fault in writing it says the same once more
                raise refused("write", self._path, error) from error


class PairSpool:
    """The pairs of a closed spool, by index.

    Args:
        path: A file that a :class:`PairSpoolWriter` has closed.
    """

    def __init__(self, path: Path) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    def read(self, indices: Sequence[int]) -> list[TokenPair]:
        """The pairs with these indices, in this order."""
        batches: dict[int, pa.RecordBatch] = {}
        return [self._pair(int(index), batches) for index in indices]

    def _pair(self, index: int, batches: dict[int, pa.RecordBatch]) -> TokenPair:
        number, row = divmod(index, ROWS_PER_BATCH)
        batch = batches.get(number)
        if batch is None:
            batch = batches[number] = self._reader.get_batch(number)
        prompt_ids, chosen_ids, rejected_ids, scored_mask = (
            batch.column(field)[row].values for field in range(len(SPOOL_SCHEMA))
        )
        return TokenPair(
            prompt_ids=prompt_ids.to_numpy(),
            chosen_ids=chosen_ids.to_numpy(),
            rejected_ids=rejected_ids.to_numpy(),
            scored_mask=None if scored_mask is None else np.asarray(scored_mask.to_numpy(zero_copy_only=False), bool),
        )

"""Scored pairs to a shard: one finished unit of work, written once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import DpoCacheError
from ..data.token_pair import canonical_scored_mask
from .canonical_json import canonical_bytes
from .digest_named_file import write_digest_named
from .example_key import KEY_BYTES, KEY_VERSION, keys_array
from .format_version import FORMAT_VERSION
from .parquet_file import KEY_COLUMN, parquet_bytes
from .scored_pair import VALUE_COLUMNS, ScoredPair, unusable_in_words, unusable_values, values_of
from .shard_file import SCHEMA, TOKEN_LOGPS_KEY, ShardRef, list_of

MAX_ROW_GROUP_PAIRS = 512
MAX_ROW_GROUP_IDS = 32_768
"""Small row groups: shuffled reading decodes a whole one for a single pair."""
MAX_ROW_GROUPS = 1024
"""A reader takes no larger footer than these make."""


def write_shard(
    shards_folder: Path,
    rows: Sequence[ScoredPair],
    *,
    reference_id: str,
    scoring_version: int,
    recorded: Mapping[str, Any],
    temporary_folder: Path,
) -> ShardRef:
    """Write one finished unit of work. The same rows, reference and record give the same file.

    Args:
        shards_folder: Where the shard becomes visible, under the digest of its bytes.
        rows: At least one, and no more than :func:`~dpo_cache.stages.building.build_plan.cut_units` puts into a unit,
            in the order they are to have. Their counts and keys must be right.
        reference_id: Digest of the reference that scored them.
        scoring_version: Version of the scoring code, in the footer for readers without ``cache.json``.
        recorded: How they were scored (library versions, hardware, batch layout). Not part of any key, but of
            the bytes, so nothing that changes by itself, like a clock, belongs here.
        temporary_folder: For the unfinished file.

    Raises:
        DpoCacheError: A value is not finite or not below zero, naming the pair; or the disk refused.
    """
    assert rows
    row_groups = list(_row_group_bounds(rows))
    assert len(row_groups) <= MAX_ROW_GROUPS, "rows are cut into units first"
    refuse_unusable_values(rows)
    has_token_logps = {row.has_token_logps for row in rows}
    assert len(has_token_logps) == 1, "all rows of a shard have log-probabilities per token, or none"
    content = parquet_bytes(
        (_table(rows[start:stop]) for start, stop in row_groups),
        SCHEMA,
        metadata={
            "dpo_cache.format_version": str(FORMAT_VERSION),
            "dpo_cache.reference_id": reference_id,
            "dpo_cache.key_version": str(KEY_VERSION),
            "dpo_cache.scoring_version": str(scoring_version),
            "dpo_cache.recorded": canonical_bytes(dict(recorded)).decode(),
            **({TOKEN_LOGPS_KEY: "true"} if True in has_token_logps else {}),
        },
        rows_per_group=MAX_ROW_GROUP_PAIRS,
    )
    shard = ShardRef(sha256=hashlib.sha256(content).hexdigest(), num_rows=len(rows), num_bytes=content.nbytes)
    write_digest_named(shards_folder / shard.file_name, content, temporary_folder=temporary_folder)
    return shard


def refuse_unusable_values(rows: Sequence[ScoredPair]) -> None:
    """Refuse values that no reference can have given.

    Raises:
        DpoCacheError: Naming the pairs.
    """
    values = values_of(rows)
    if unusable_values(values).any():
        raise DpoCacheError(unusable_in_words(keys_array([row.key for row in rows]), values))


def _row_group_bounds(rows: Sequence[ScoredPair]) -> Iterator[tuple[int, int]]:
    start = ids = 0
    for index, row in enumerate(rows):
        length = row.pair.shared_prefix_tokens
        if index > start and (ids + length > MAX_ROW_GROUP_IDS or index - start == MAX_ROW_GROUP_PAIRS):
            yield start, index
            start, ids = index, 0
        ids += length
    yield start, len(rows)


def _table(rows: Sequence[ScoredPair]) -> pa.Table:
    columns: dict[str, Any] = {
        KEY_COLUMN: pa.array([row.key for row in rows], type=pa.binary(KEY_BYTES)),
        "prompt_ids": _lists([row.pair.prompt_ids for row in rows], np.int32),
        "chosen_ids": _lists([row.pair.chosen_ids for row in rows], np.int32),
        "rejected_ids": _lists([row.pair.rejected_ids for row in rows], np.int32),
        "scored_mask": _lists([canonical_scored_mask(row.pair) for row in rows], np.bool_),
        "chosen_tokens": pa.array([row.chosen_tokens for row in rows], type=pa.int32()),
        "rejected_tokens": pa.array([row.rejected_tokens for row in rows], type=pa.int32()),
        "ref_chosen_token_logps": _lists([row.chosen_token_logps for row in rows], np.float32),
        "ref_rejected_token_logps": _lists([row.rejected_token_logps for row in rows], np.float32),
    }
    for name in VALUE_COLUMNS:
        columns[name] = pa.array([getattr(row, name) for row in rows], type=pa.float64())
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _lists(rows: Sequence[npt.NDArray[Any] | None], kind: type[np.generic]) -> pa.ListArray:
    """A list column from arrays, None for a missing one, without making Python numbers of the entries."""
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    present = [row for row in rows if row is not None]
    flat = np.concatenate(present).astype(kind, copy=False) if present else np.empty(0, dtype=kind)
    values = pa.array(flat)
    absent = pa.array([row is None for row in rows]) if len(present) < len(rows) else None
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=list_of(values.type), mask=absent)

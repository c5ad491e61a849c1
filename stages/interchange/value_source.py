"""Reference values that another trainer left behind: TRL's columns or open-instruct's cache.

Shapes: N rows of the source, W pairs that wait for values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_from_disk

from ...errors import DpoCacheError, first_line
from ...pipeline.cache.example_key import Keys, example_key, keys_array
from ...pipeline.cache.parquet_file import file_sha256
from ...pipeline.data.token_pair import TokenPair
from .trl_columns import REFERENCE_ID_KEY, TRL_SCHEMA

TOKEN_COLUMNS = tuple(TRL_SCHEMA.names[:3])
VALUE_COLUMNS = tuple(TRL_SCHEMA.names[3:])
_ROWS_AT_ONCE = 1024
_KINDS = "a .pt file of open-instruct, or a .parquet or .arrow file or a saved dataset with TRL's columns"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SourceValues:
    """What a source says.

    Attributes:
        values: Chosen and rejected, as they stand there, shape (N, 2).
        keys: The key of each row's tokens, shape (N,); None where the source has no tokens, and rows are told by
            their position.
        reference_id: Whose values they are, where the source says so.
        recorded: What the import records of it.
    """

    values: npt.NDArray[np.float64]
    keys: Keys | None
    reference_id: str | None
    recorded: dict[str, Any]


def read_source(path: Path) -> SourceValues:
    """Read all values of a source: 16 bytes a row stay in memory, and 32 for its key.

    Args:
        path: A ``.pt`` file of open-instruct; a ``.parquet`` or ``.arrow`` file, or a folder that
            ``Dataset.save_to_disk`` wrote, with TRL's columns.

    Raises:
        DpoCacheError: It is none of these, or damaged.
    """
    if not path.exists():
        raise DpoCacheError(f"there is no {path}", expected=_KINDS)
    try:
        if path.suffix == ".pt":
            return _read_open_instruct(path)
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                metadata = file.metadata.metadata or {}
                return _from_columns(path, _parquet_batches(file), metadata.get(REFERENCE_ID_KEY.encode()))
        if path.suffix == ".arrow" or (path / "state.json").exists():
            dataset = load_from_disk(str(path)) if path.is_dir() else Dataset.from_file(str(path))
            return _from_columns(path, _dataset_batches(dataset), None)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, pa.ArrowException) as error:
        raise DpoCacheError(f"{path} cannot be read: {first_line(error)}", expected=_KINDS) from error
    raise DpoCacheError(f"{path} is no source of reference values", expected=_KINDS)


# ---- open-instruct's cache ----


def _read_open_instruct(path: Path) -> SourceValues:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise DpoCacheError(
            f"{path} cannot be read: {first_line(error)}",
            expected="a file that torch.save wrote, of tensors alone",
        ) from error
    expected = "a dictionary of two equally long lists of numbers, chosen_logps and rejected_logps"
    if not isinstance(content, dict) or content.keys() != {"chosen_logps", "rejected_logps"}:
        names = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DpoCacheError(f"{path} holds {str(names)[:200]}", expected=expected)
    chosen, rejected = content["chosen_logps"], content["rejected_logps"]
    for tensor in (chosen, rejected):
        if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == 1):
            raise DpoCacheError(f"{path} holds something else than lists of numbers", expected=expected)
    if len(chosen) != len(rejected):
        raise DpoCacheError(f"{path} holds {len(chosen)} chosen and {len(rejected)} rejected values", expected=expected)
    return SourceValues(
        values=torch.stack([chosen, rejected], dim=1).double().numpy(),
        keys=None,
        reference_id=None,
        recorded=_recorded(path, "open-instruct"),
    )


# ---- TRL's columns ----


def _parquet_batches(file: pq.ParquetFile) -> Iterator[pa.Table]:
    names = [name for name in (*TOKEN_COLUMNS, *VALUE_COLUMNS) if name in file.schema_arrow.names]
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
        yield pa.Table.from_batches([batch])


def _dataset_batches(dataset: Any) -> Iterator[pa.Table]:
    if not isinstance(dataset, Dataset):
        raise ValueError("it holds several splits; name the folder of one of them")
    yield from dataset.with_format("arrow").iter(_ROWS_AT_ONCE)


def _from_columns(path: Path, batches: Iterator[pa.Table], reference_id: bytes | None) -> SourceValues:
    values: list[npt.NDArray[np.float64]] = []
    keys: list[Keys] = []
    has_tokens = False
    for table in batches:
        missing = [name for name in VALUE_COLUMNS if name not in table.column_names]
        if missing:
            raise DpoCacheError(
                f"{path} has no column {missing[0]}", expected=f"the columns {', '.join(TRL_SCHEMA.names)}"
            )
        columns = [table.column(name).to_numpy().astype(np.float64) for name in VALUE_COLUMNS]
        values.append(np.stack(columns, axis=1))
        has_tokens = set(TOKEN_COLUMNS) <= set(table.column_names)
        if has_tokens:
            keys.append(_keys(table))
    return SourceValues(
        values=np.concatenate(values) if values else np.empty((0, 2)),
        keys=np.concatenate(keys) if has_tokens else None,
        reference_id=reference_id.decode() if reference_id else None,
        recorded=_recorded(path, "trl"),
    )


def _keys(table: pa.Table) -> Keys:
    """The keys of rows as TRL scores them: every answer token, and no prompt token."""
    columns = [_id_lists(table.column(name)) for name in TOKEN_COLUMNS]
    pairs = (
        TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        for prompt, chosen, rejected in zip(*columns, strict=True)
    )
    return keys_array([example_key(pair) for pair in pairs])


def _id_lists(column: pa.ChunkedArray) -> list[npt.NDArray[np.int32]]:
    return [np.array(ids, dtype=np.int32) for ids in column.to_pylist()]


# ---- provenance ----


def _recorded(path: Path, kind: str) -> dict[str, Any]:
    """Where values came from: the trainer, the file's name and its digest (of a folder: of its files' digests)."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        listed = [[str(file.relative_to(path)), file_sha256(file)] for file in files]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    else:
        digest = file_sha256(path)
    return {"from": kind, "name": path.name, "sha256": digest}

"""Several mixtures as one: the mixture that one build of all their datasets would make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pipeline.cache.canonical_json import canonical_bytes
from ...pipeline.cache.mixture_rows import MixtureRows, places_in_runs
from .left_out import LEFT_OUT
from .mixture_content import MixtureContent
from .row_counts import DROPPED, TRUNCATED

Dataset = tuple[bytes, int]
"""What a dataset is, and how many of the same stand before it in its mixture."""


def united(parts: Sequence[MixtureContent]) -> MixtureContent:
    """All rows of all datasets of the parts, each dataset once.

    A row is already there if its dataset is and has the row as often. Datasets are told by their bytes (on the Hub by
    their commit) and the number of rows that were picked, not by their paths. A pair that stands in two datasets is
    trained on twice, and so is a dataset that one build names twice.

    Args:
        parts: At least one, their tokens made alike. The order of datasets, and what is recorded of one that stands
            in several parts, is that of the parts; the rows do not depend on it.
    """
    numbers: dict[Dataset, int] = {}
    sources: list[dict[str, Any]] = []
    rows: list[MixtureRows] = []
    for part in parts:
        datasets = _datasets(part.sources)
        for dataset, source in zip(datasets, part.sources, strict=True):
            if dataset not in numbers:
                numbers[dataset] = len(sources)
                sources.append(source)
        renumbered = np.array([numbers[dataset] for dataset in datasets], dtype=np.int32)
        rows.append(replace(part.rows, sources=renumbered[part.rows.sources]))
    return MixtureContent(rows=_each_once(rows), tokenization=parts[0].tokenization, sources=sources, is_new=True)


def canonical_order(parts: Sequence[MixtureContent]) -> list[MixtureContent]:
    """The parts in an order that does not depend on how they were listed."""
    return sorted(parts, key=lambda part: canonical_bytes([part.sources, part.tokenization]))


def _datasets(sources: Sequence[dict[str, Any]]) -> list[Dataset]:
    identities = [_identity(source) for source in sources]
    return [(identity, identities[:number].count(identity)) for number, identity in enumerate(identities)]


def _identity(source: dict[str, Any]) -> bytes:
    files = source.get("files")
    if isinstance(files, list) and all(isinstance(file, dict) and "sha256" in file for file in files):
        named = {name: source.get(name) for name in ("split", "config", "picked_rows")}
        return canonical_bytes({**named, "files": [file["sha256"] for file in files]})
    # The commit says more than the revision, the number of rows more than the amount.
    unimportant = ("revision", "amount", DROPPED, TRUNCATED, LEFT_OUT)
    return canonical_bytes({name: value for name, value in source.items() if name not in unimportant})


def _each_once(parts: Sequence[MixtureRows]) -> MixtureRows:
    """Rows of all parts; of those that say the same in several parts, as many as the part with most has."""
    copies = np.concatenate([_earlier_equals(_columns(rows)) for rows in parts])
    rows = MixtureRows.concatenate(parts)
    return rows.take(np.flatnonzero(_earlier_equals([*_columns(rows), copies]) == 0))


def _columns(rows: MixtureRows) -> list[npt.NDArray[Any]]:
    return [rows.sources, rows.source_rows, rows.example_keys]


def _earlier_equals(columns: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """For each row of these columns, how many equal rows stand before it."""
    order = np.lexsort(columns[::-1])  # stable
    starts_run = np.ones(len(order), dtype=np.bool_)
    starts_run[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    earlier = np.empty(len(order), dtype=np.int64)
    earlier[order] = places_in_runs(starts_run)
    return earlier

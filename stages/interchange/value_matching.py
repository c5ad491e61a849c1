"""Which value of a source belongs to which pair: by its tokens, or by its row's position in the datasets.

Shapes: N rows of the source, P picked rows of the datasets, W pairs that wait for values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ...pipeline.cache.example_key import Keys
from ...pipeline.cache.key_index import places_among
from ...pipeline.cache.mixture_rows import MixtureRows
from ...pipeline.cache.scored_pair import unusable_in_words, whole_values
from ...pipeline.data.dataset_source import DatasetSource
from .value_source import SourceValues


def with_keys(path: Path, source: SourceValues, rows: MixtureRows, datasets: Sequence[DatasetSource]) -> SourceValues:
    """Give the rows of a source without tokens the keys of the dataset rows at their positions.

    Trainers count the rows they were given, or those they kept: either number tells which.

    Args:
        path: The source, for messages.
        source: Its values, a row each.
        rows: The training pairs that the datasets make.
        datasets: The datasets, in the order in which the trainer was given them.

    Raises:
        DpoCacheError: It has neither as many rows as were picked nor as many as make a pair.
    """
    keys, makes_pair = _keys_of_picked_rows(rows, datasets)
    num_values, num_picked, num_pairs = len(source.values), len(keys), int(makes_pair.sum())
    if num_values == num_picked:
        return replace(source, values=source.values[makes_pair], keys=keys[makes_pair])
    if num_values == num_pairs:
        return replace(source, keys=keys[makes_pair])
    raise DpoCacheError(
        f"{path} has values for {num_values} rows, by their position, and the datasets have {num_picked}, of which "
        f"{num_pairs} make a pair",
        expected="one of these numbers",
        next_step="name the datasets of the run that wrote it, in its order and with its amounts, template and length",
    )


def matched_values(path: Path, source: SourceValues, keys: Keys) -> npt.NDArray[np.float64]:
    """The values of the pairs with these keys, shape (W, 2); NaN for those that the source lacks.

    Raises:
        DpoCacheError: It lacks all of them, or holds a value for one that no reference gives.
    """
    assert source.keys is not None
    order = np.argsort(source.keys, kind="stable")  # stable: of equal rows the first
    places = places_among(source.keys[order], keys)
    found = places >= 0
    if len(keys) and not found.any():
        raise DpoCacheError(
            f"none of the {len(keys)} pairs that these datasets make stands in {path} with the same tokens",
            expected="the tokens that the source was made with",
            next_step="use its tokenizer, --chat-template, --truncation and --max-seq-length, and --mask last-turn; "
            "`dpo-cache show` prints what a build made of the datasets",
        )
    values = np.full((len(keys), 2), np.nan)
    values[found] = source.values[order[places[found]]]
    unusable = found & ~(np.isfinite(values) & (values < 0)).all(axis=1)
    if unusable.any():
        raise DpoCacheError(
            f"{path} holds values that are not finite or not below zero for {int(unusable.sum())} pairs: "
            f"{unusable_in_words(keys[unusable], whole_values(*values[unusable].T))}",
            expected="log-probabilities",
        )
    return values


def _keys_of_picked_rows(rows: MixtureRows, datasets: Sequence[DatasetSource]) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """The key of each picked row of all datasets in order, shape (P,), and whether it makes a pair at all."""
    keys, makes_pair = [], []
    for number, dataset in enumerate(datasets):
        of_dataset = np.flatnonzero(rows.sources == number)
        source_rows, first = np.unique(rows.source_rows[of_dataset], return_index=True)
        places = places_among(source_rows, dataset.picked_rows)
        is_there = places >= 0
        keys_here = np.zeros(len(places), dtype=rows.example_keys.dtype)
        keys_here[is_there] = rows.example_keys[of_dataset[first[places[is_there]]]]
        keys.append(keys_here)
        makes_pair.append(is_there)
    return np.concatenate(keys), np.concatenate(makes_pair)

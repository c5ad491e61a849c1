"""Evaluation pairs that are also trained on: what a held-out figure must not be measured on without a word."""

from __future__ import annotations

import numpy as np

from ...pipeline.cache.key_index import places_among
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.parquet_file import KEY_COLUMN
from ..console.counted_noun import counted


def overlap_warnings(training: Mixture, evaluation: Mixture | None) -> list[str]:
    """A sentence for the log where the two mixtures share pairs; nothing where there is no evaluation."""
    shared = 0 if evaluation is None else num_shared(training, evaluation)
    if evaluation is None or not shared:
        return []
    verb = "is" if shared == 1 else "are"
    return [
        f"{shared:,} of {counted(evaluation.num_pairs, 'evaluation pair')} {verb} also trained on (--mixture "
        f"{training.name}, --eval-mixture {evaluation.name}): evaluation does not show how the policy does on new pairs"
    ]


def num_shared(training: Mixture, evaluation: Mixture) -> int:
    """How many pairs of ``evaluation`` are in ``training`` too; a block of that one is in memory at a time."""
    if training.digest == evaluation.digest:
        return evaluation.num_pairs
    wanted, repeats = np.unique(evaluation.table.column(KEY_COLUMN), return_counts=True)
    is_shared = np.zeros(len(wanted), dtype=np.bool_)
    for number in range(-(-training.num_pairs // training.block_rows)):
        places = places_among(wanted, training.table.block(number).keys)
        is_shared[places[places >= 0]] = True
    return int(repeats[is_shared].sum())

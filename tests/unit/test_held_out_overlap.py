"""Evaluation pairs that are trained on too are counted, repeats and all, a block at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.stages.training.held_out_overlap import num_shared, overlap_warnings

ROWS = make_rows(40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceCache:
    """Forty rows; mixtures are read four pairs at a time."""
    monkeypatch.setattr("dpo_cache.pipeline.cache.mixture_table.BLOCK_ROWS", 4)
    made = make_cache(tmp_path / "cache")
    fill_cache(made, ROWS, shard_rows=10, name="all")
    return made


def mixture_of(cache: ReferenceCache, name: str, places: list[int]) -> Mixture:
    rows = mixture_rows(ROWS)
    chosen = MixtureRows(**{field: getattr(rows, field)[np.array(places)] for field in rows.__slots__})
    index = cache.shards.key_index()
    return cache.write_mixture(name, chosen, key_index=index, tokenization={}, sources=[{}], dropped={})


def test_shared_pairs_are_counted_wherever_they_stand(cache: ReferenceCache) -> None:
    training = mixture_of(cache, "train", list(range(22)))
    evaluation = mixture_of(cache, "held-out", [0, 7, 21, 22, 30, 39])
    assert num_shared(training, evaluation) == 3
    (warning,) = overlap_warnings(training, evaluation)
    assert warning.startswith("3 of 6 evaluation pairs are also trained on (--mixture train, --eval-mixture held-out)")


def test_a_pair_that_evaluation_repeats_counts_as_often(cache: ReferenceCache) -> None:
    training = mixture_of(cache, "train", [1, 1, 2, 3])
    assert num_shared(training, mixture_of(cache, "held-out", [1, 1, 1, 8])) == 3


def test_pairs_that_were_held_out_need_no_word(cache: ReferenceCache) -> None:
    training = mixture_of(cache, "train", list(range(20)))
    assert overlap_warnings(training, mixture_of(cache, "held-out", list(range(20, 40)))) == []
    assert overlap_warnings(training, None) == []


def test_the_training_pairs_themselves_under_another_name_are_all_shared(cache: ReferenceCache) -> None:
    training = mixture_of(cache, "train", [3, 1, 2])
    assert num_shared(training, mixture_of(cache, "same", [1, 2, 3])) == 3

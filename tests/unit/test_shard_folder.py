"""The shards of a cache: looked over, replaced, taken over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.mixture_check import check_mixture
from dpo_cache.stages.compact import compact


def test_damaged_foreign_and_stray_files_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(30), shard_rows=10)
    damaged = cache.shards.paths()[1]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    foreign = make_cache(tmp_path / "other", attention="eager").shards.write(make_rows(3, seed=5))
    (cache.path / "shards" / foreign.file_name).write_bytes(
        (tmp_path / "other" / "shards" / foreign.file_name).read_bytes()
    )
    (cache.path / "shards" / "notes.txt").write_text("x")
    unusable = cache.shards.unusable()
    reasons = {shard.path.name: shard.reason for shard in unusable}
    assert reasons.keys() == {damaged.name, foreign.file_name, "notes.txt"}
    assert "is damaged" in reasons[damaged.name]
    assert "belongs to the reference" in reasons[foreign.file_name]
    assert "not a shard" in reasons["notes.txt"]
    assert len(cache.shards.key_index(without=[shard.path for shard in unusable])) == 20
    with pytest.raises(DpoCacheError):
        cache.shards.key_index()


def test_a_damaged_shard_that_is_scored_again_is_whole_again(tmp_path: Path) -> None:
    """The same rows are the same file, so the new one takes the damaged one's place."""
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(20), shard_rows=10)
    damaged = cache.shards.paths()[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    unusable = [shard.path for shard in cache.shards.unusable()]
    assert len(cache.shards.key_index(without=unusable)) == 10
    for start in (0, 10):
        cache.shards.write(make_rows(20)[start : start + 10])
    assert len(cache.shards.key_index(without=unusable)) == 20
    check_mixture(cache, cache.read_mixture("train"))


def test_a_row_whose_sums_are_all_known_counts_before_an_imported_one_whatever_their_digests(tmp_path: Path) -> None:
    """Merging a scored cache with an imported one must not make values unknown, nor compacting drop the known ones."""
    for seed in range(6):  # either of the two digests may be the lower one
        cache = make_cache(tmp_path / str(seed))
        scored = make_rows(3, seed=seed)
        cache.shards.write([replace(row, ref_chosen_common_logps=np.nan) for row in scored])
        known = cache.shards.write(scored)
        index = cache.shards.key_index()
        assert {index.shards[number] for number in index.shard_numbers} == {known}
        compact(cache.path)
        (only,) = cache.shards.paths()
        with cache.shards.open(only) as shard:
            assert not shard.has_unknown_values


def test_only_whole_shards_of_this_reference_are_imported(tmp_path: Path) -> None:
    ours, theirs = make_cache(tmp_path / "ours"), make_cache(tmp_path / "theirs", attention="eager")
    fill_cache(theirs, make_rows(5), shard_rows=5)
    with pytest.raises(DpoCacheError, match="belongs to the reference"):
        ours.shards.import_copy(theirs.shards.paths()[0])
    with pytest.raises(DpoCacheError, match="belongs to another reference"):
        ours.import_mixture(theirs.read_mixture("train"))
    same = make_cache(tmp_path / "same")
    mixture = fill_cache(same, make_rows(5), shard_rows=5)
    with pytest.raises(DpoCacheError, match="1 shards of mixture train are missing"):
        ours.import_mixture(mixture)
    path = same.shards.paths()[0]
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(DpoCacheError, match="is damaged"):
        ours.shards.import_copy(path)
    assert ours.shards.paths() == []
    assert not list((ours.path / "tmp").glob("*.partial"))

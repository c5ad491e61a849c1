"""Reading by mixture row gives the right pairs, decodes little, and believes nothing it has not checked."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import mixture_table, row_reader, shard_file, shard_writer
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.example_key import example_key, key_at
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.pipeline.cache.pair_order import epoch_order
from dpo_cache.pipeline.cache.pair_stream import PairStream
from dpo_cache.pipeline.cache.row_group import RowGroup
from dpo_cache.pipeline.cache.row_reader import RecentlyUsed, RowReader
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.cache.shard_file import ShardReader
from dpo_cache.pipeline.cache.shard_folder import ShardFolder


@pytest.fixture
def small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_table, "BLOCK_ROWS", 16)
    monkeypatch.setattr(shard_writer, "MAX_ROW_GROUP_PAIRS", 8)


@pytest.fixture
def cache(tmp_path: Path, small_grain: None) -> ReferenceCache:
    return make_cache(tmp_path / "cache")


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    decoded: Counter[tuple[str, int]] = Counter()
    read_row_group = ShardReader.read_row_group

    def counting(shard: ShardReader, group: int) -> RowGroup:
        decoded[shard.path.name, group] += 1
        return read_row_group(shard, group)

    monkeypatch.setattr(ShardReader, "read_row_group", counting)
    return decoded


def test_an_epoch_gives_each_pair_its_own_ids_and_values(cache: ReferenceCache) -> None:
    rows = make_rows(150)
    cache.shards.write(rows[:70])
    cache.shards.write(rows[70:])
    asked = mixture_rows(rows)
    mixture = cache.write_mixture(
        "train",
        MixtureRows.concatenate([asked, asked.take(np.arange(40))]),
        key_index=cache.shards.key_index(),
        tokenization={},
        sources=[{}],
        dropped={},
    )
    order = epoch_order(num_pairs=190, block_rows=16, seed=0, epoch=0, mixture_digest=mixture.digest, window_blocks=4)
    stream = PairStream(cache, mixture)
    read = [pair for start in range(0, 190, 32) for pair in stream.read(order[start : start + 32])]
    keys = mixture.table.column("example_key")
    assert [pair.key for pair in read] == [key_at(keys, row) for row in order]
    by_key = {row.key: row for row in rows}
    for pair in read:
        row = by_key[pair.key]
        assert pair.pair.prompt_ids.tolist() == row.pair.prompt_ids.tolist()
        assert pair.pair.rejected_scored.tolist() == row.pair.rejected_scored.tolist()
        for field in dataclasses.fields(ScoredPair):
            if field.name.endswith(("_logps", "_tokens")) and "token_logps" not in field.name:
                assert getattr(pair, field.name) == getattr(row, field.name)
    stream.close()


def test_a_row_may_be_asked_for_twice_and_no_row_gives_none(cache: ReferenceCache) -> None:
    stream = PairStream(cache, fill_cache(cache, make_rows(20), shard_rows=20))
    first, again = stream.read(np.array([3, 3]))
    assert first.key == again.key
    assert stream.read(np.array([], dtype=np.int64)) == []


def test_one_read_decodes_each_row_group_once_even_with_no_room_to_keep_them(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = fill_cache(cache, make_rows(200), shard_rows=50)
    decoded = count_decoding(monkeypatch)
    stream = PairStream(cache, mixture, cached_bytes=1)
    stream.read(np.random.RandomState(0).permutation(200))
    assert set(decoded.values()) == {1}
    assert len(decoded) == 4 * 7


def test_going_along_an_epoch_decodes_each_row_group_about_once(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards in the order of the mixture, as a build writes them."""
    rows = sorted(make_rows(400), key=lambda row: row.key)
    in_order = fill_cache(cache, rows, shard_rows=400, name="order").table.column("example_key")
    place = {key_at(in_order, index): index for index in range(400)}
    other = make_cache(cache.path.parent / "other")
    mixture = fill_cache(other, sorted(rows, key=lambda row: place[row.key]), shard_rows=100)
    decoded = count_decoding(monkeypatch)
    stream = PairStream(other, mixture, cached_bytes=60_000)
    order = epoch_order(num_pairs=400, block_rows=16, seed=0, epoch=0, mixture_digest="x", window_blocks=4)
    for start in range(0, 400, 8):
        stream.read(order[start : start + 8])
    assert len(decoded) == 4 * 13
    assert sum(decoded.values()) < 2 * len(decoded)


def test_memory_does_not_grow_with_the_cache(tmp_path: Path, small_grain: None) -> None:
    def peak(num_rows: int) -> int:
        """Bytes of decoded Parquet alive after any of the reads of an epoch."""
        cache = make_cache(tmp_path / str(num_rows))
        mixture = fill_cache(cache, make_rows(num_rows), shard_rows=50)
        stream = PairStream(cache, mixture, cached_bytes=20_000)
        before, most = pa.total_allocated_bytes(), 0
        for start in range(0, num_rows, 16):
            stream.read(np.arange(start, min(start + 16, num_rows)))
            most = max(most, pa.total_allocated_bytes() - before)
        return most

    assert 10_000 < peak(1000) < 1.2 * peak(200)


def test_each_shard_is_hashed_once_and_before_its_first_row(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = fill_cache(cache, make_rows(60), shard_rows=20)
    hashed: list[str] = []
    verify = shard_file.verify_shard

    def recording(path: Path) -> None:
        hashed.append(path.name)
        verify(path)

    monkeypatch.setattr(row_reader, "verify_shard", recording)
    monkeypatch.setattr(row_reader, "MAX_OPEN_SHARDS", 1)
    stream = PairStream(cache, mixture)
    for row in range(60):
        stream.read(np.array([row]))
    assert sorted(hashed) == sorted(shard.file_name for shard in mixture.shards)


def test_the_shards_of_hundreds_of_small_builds_are_opened_once_however_an_epoch_goes_through_them(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    open_shard = ShardFolder.open

    def counting(folder: ShardFolder, path: Path) -> ShardReader:
        opened[path.name] += 1
        return open_shard(folder, path)

    mixture = fill_cache(cache, make_rows(300), shard_rows=1)
    monkeypatch.setattr(ShardFolder, "open", counting)
    stream = PairStream(cache, mixture, cached_bytes=1)
    order = epoch_order(num_pairs=300, block_rows=16, seed=0, epoch=0, mixture_digest="x")
    for _ in range(2):
        for start in range(0, 300, 8):
            stream.read(order[start : start + 8])
    stream.close()
    assert len(opened) == 300
    assert set(opened.values()) == {1}


def test_a_process_that_may_open_few_files_reads_many_shards_all_the_same(cache: ReferenceCache) -> None:
    mixture = fill_cache(cache, make_rows(120), shard_rows=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(80, 2 * in_use), hard))
        assert len(PairStream(cache, mixture).read(np.arange(120))) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def num_open_shards(cache: ReferenceCache) -> int:
    """How many shards of a cache this process has open."""
    open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sum(path in open_files for path in map(os.path.realpath, cache.shards.paths()))


def test_open_shards_are_bounded_by_the_row_groups_that_they_describe(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_reader, "MAX_OPEN_ROW_GROUPS", 10)
    mixture = fill_cache(cache, make_rows(120), shard_rows=24)  # three row groups each
    reader = RowReader(cache, mixture.shards)
    for shard in range(5):
        reader.pair(shard, 0)
        assert num_open_shards(cache) == min(shard + 1, 3)
    reader.close()
    assert num_open_shards(cache) == 0


def test_no_flipped_bit_of_a_shard_is_ever_handed_out(cache: ReferenceCache) -> None:
    rows = make_rows(4)
    mixture = fill_cache(cache, rows, shard_rows=4)
    path = cache.shards.paths()[0]
    whole = path.read_bytes()
    for place in np.random.RandomState(0).choice(len(whole) * 8, size=150, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DpoCacheError, match="is damaged"):
            PairStream(cache, mixture).read(np.array([0]))
    path.unlink()
    with pytest.raises(DpoCacheError, match="is missing"):
        PairStream(cache, mixture).read(np.array([0]))


def test_a_mixture_that_points_at_other_rows_is_refused(cache: ReferenceCache) -> None:
    """As a stranger could forge it: digests are right, places are not."""
    rows = make_rows(20)
    cache.shards.write(rows)
    index = cache.shards.key_index()
    asked = mixture_rows(rows)

    def forged(**changes: object) -> Mixture:
        shifted = dataclasses.replace(index, **changes)  # type: ignore[arg-type]
        return cache.write_mixture("x", asked, key_index=shifted, tokenization={}, sources=[{}], dropped={})

    for changes in ({"rows": np.roll(index.rows, 1)}, {"rows": index.rows + 20}, {"rows": index.rows - 20}):
        with pytest.raises(DpoCacheError, match="which holds another"):
            PairStream(cache, forged(**changes)).read(np.array([0]))
    longer = dataclasses.replace(asked, prompt_lengths=asked.prompt_lengths + 1)
    mixture = cache.write_mixture("x", longer, key_index=index, tokenization={}, sources=[{}], dropped={})
    with pytest.raises(DpoCacheError, match="which holds another"):
        PairStream(cache, mixture).read(np.array([0]))
    mixture = forged()
    mixture.shards.clear()
    with pytest.raises(DpoCacheError, match="names a shard that it does not list"):
        PairStream(cache, mixture).read(np.array([0]))


def test_a_row_whose_ids_are_not_those_of_its_key_is_refused(cache: ReferenceCache) -> None:
    """Digests, places and lengths are right; somebody changed a token and made the shard anew."""
    rows = make_rows(3)
    changed = dataclasses.replace(rows[1].pair, prompt_ids=rows[1].pair.prompt_ids ^ 1)
    mixture = fill_cache(cache, [rows[0], dataclasses.replace(rows[1], pair=changed), rows[2]], shard_rows=3)
    with pytest.raises(DpoCacheError, match=f"the key {rows[1].key.hex()} is not that of its token ids"):
        PairStream(cache, mixture).read(np.arange(3))


def test_a_row_of_the_right_lengths_and_another_key_is_refused(cache: ReferenceCache) -> None:
    row = make_rows(1)[0]
    other_pair = dataclasses.replace(row.pair, prompt_ids=row.pair.prompt_ids ^ 1)
    rows = [row, dataclasses.replace(row, pair=other_pair, key=example_key(other_pair))]
    cache.shards.write(rows)
    index = cache.shards.key_index()
    swapped = dataclasses.replace(index, rows=index.rows[::-1])
    mixture = cache.write_mixture("x", mixture_rows(rows), key_index=swapped, tokenization={}, sources=[{}], dropped={})
    with pytest.raises(DpoCacheError, match="which holds another"):
        PairStream(cache, mixture).read(np.array([0]))


def test_a_shard_of_another_reference_under_its_right_digest_is_refused(cache: ReferenceCache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", attention="eager")
    mixture = fill_cache(other, make_rows(5), shard_rows=5)
    shard = other.shards.paths()[0]
    (cache.path / "shards" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(DpoCacheError, match="belongs to the reference"):
        PairStream(cache, mixture).read(np.array([0]))


def test_what_no_read_has_needed_for_long_is_dropped_however_much_room_there_is() -> None:
    kept: RecentlyUsed[int, Any] = RecentlyUsed(1 << 30, max_idle=10)
    for number in range(100):
        if kept.get(number // 4) is None:
            kept.put(number // 4, SimpleNamespace(num_bytes=1))
        assert kept.get(0) is not None, "what is needed again and again stays"
    assert [number for number in range(25) if kept.get(number) is not None] == [0, 22, 23, 24]

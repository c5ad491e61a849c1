"""A mixture is the same training set however it was listed, and its pointer is believed only where it can be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_pair, make_row, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import mixture_table
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.canonical_json import read_sealed_json, write_sealed_json
from dpo_cache.pipeline.cache.example_key import key_at, prompt_hash
from dpo_cache.pipeline.cache.mixture import Mixture, check_name
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows


def write(cache: ReferenceCache, rows: MixtureRows, name: str = "train") -> Mixture:
    return cache.write_mixture(
        name, rows, key_index=cache.shards.key_index(), tokenization={}, sources=[{}], dropped={}
    )


def columns(mixture: Mixture) -> dict[str, list[Any]]:
    return {name: mixture.table.column(name).tolist() for name in mixture_table.TABLE_SCHEMA.names}


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return make_cache(tmp_path / "cache")


def test_a_mixture_comes_back_as_it_was_written(cache: ReferenceCache) -> None:
    rows = make_rows(30)
    written = fill_cache(cache, rows, shard_rows=8)
    read = cache.read_mixture("train")
    for field in ("name", "digest", "reference_id", "num_pairs", "num_distinct_pairs", "num_ids", "block_rows"):
        assert getattr(read, field) == getattr(written, field)
    assert (read.tokenization, read.sources, read.dropped) == (
        {"tokenizer": "made up"},
        [{"path": "made up"}],
        {"empty-response": 3},
    )
    assert read.shards == written.shards
    assert sorted(shard.file_name for shard in read.shards) == [path.name for path in cache.shards.paths()]
    assert read.num_pairs == read.num_distinct_pairs == 30
    assert read.num_ids["chosen"] == sum(len(row.pair.chosen_ids) for row in rows)
    assert sorted(read.shared_prefix_lengths()) == sorted(row.pair.shared_prefix_tokens for row in rows)


def test_every_row_says_where_its_pair_lies_where_shards_do_not_count_by_their_digest(cache: ReferenceCache) -> None:
    """Those with log-probabilities per token come first; a pointer names all of them by ascending digest."""
    rows = []
    for part in range(6):
        rows += (of_part := make_rows(4, seed=part, token_logps=part < 3))
        cache.shards.write(of_part)
    by_digest = np.argsort([shard.sha256 for shard in cache.shards.key_index().shards])
    assert by_digest[by_digest].tolist() != list(range(6)), "shards would lie right if they were numbered backwards"
    write(cache, mixture_rows(rows))
    assert {row.key for row in cache.pairs()} == {row.key for row in rows}


def test_every_row_says_where_its_pair_lies(cache: ReferenceCache) -> None:
    mixture = fill_cache(cache, make_rows(30), shard_rows=8)
    index = cache.shards.key_index()
    table = columns(mixture)
    assert len(set(table["example_key"])) == 30
    for key, shard, row in zip(table["example_key"], table["shard"], table["row"], strict=True):
        place = int(index.find(np.array([key]))[0])
        assert mixture.shards[shard] == index.shards[index.shard_numbers[place]]
        assert row == index.rows[place]


def test_rows_are_ordered_by_repeat_then_prompt_then_key_and_pairs_of_a_prompt_sit_together(
    cache: ReferenceCache,
) -> None:
    random = np.random.RandomState(0)
    prompts = [[number, number] for number in range(6)]
    rows = [make_row(make_pair(random, prompt=prompts[number % 6]), random) for number in range(24)]
    cache.shards.write(rows)
    asked = mixture_rows(rows)
    asked = MixtureRows.concatenate([asked, asked, asked.take(np.arange(5))])
    mixture = write(cache, asked.take(random.permutation(len(asked))))
    prompt_of = {row.key: prompt_hash(row.pair.prompt_ids) for row in rows}
    keys = mixture.table.column("example_key")
    table = [
        (int(repeat), prompt_of[key_at(keys, place)], key_at(keys, place))
        for place, repeat in enumerate(mixture.table.column("repeat"))
    ]
    assert table == sorted(table)
    seen = Counter(key for _, _, key in table)
    for key, times in seen.items():
        assert sorted(repeat for repeat, _, found in table if found == key) == list(range(times))
    assert (mixture.num_pairs, mixture.num_distinct_pairs) == (53, 24)


def test_the_order_in_which_pairs_are_listed_and_the_shards_they_lie_in_change_nothing(tmp_path: Path) -> None:
    rows = make_rows(40)
    digests, orders = set(), set()
    for number, shard_rows in enumerate((40, 7, 13)):
        cache = make_cache(tmp_path / str(number))
        mixture = fill_cache(cache, rows, shard_rows=shard_rows)
        digests.add(mixture.digest)
        shuffled = mixture_rows(rows).take(np.random.RandomState(number).permutation(40))
        digests.add(write(cache, shuffled, "shuffled").digest)
        orders.add(tuple(mixture.table.column("example_key").tolist()))
    assert len(digests) == len(orders) == 1
    assert fill_cache(make_cache(tmp_path / "less"), rows[:-1], shard_rows=40).digest not in digests


def test_a_mixture_extended_by_others_is_the_mixture_of_both(cache: ReferenceCache) -> None:
    rows = make_rows(40)
    cache.shards.write(rows)
    first = write(cache, mixture_rows(rows[:25]), "first")
    both = write(cache, MixtureRows.concatenate([first.rows(), mixture_rows(rows[25:])]), "both")
    assert both.digest == write(cache, mixture_rows(rows), "all").digest


def test_a_block_is_a_row_group_and_holds_the_columns_of_its_rows(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_table, "BLOCK_ROWS", 16)
    fill_cache(cache, make_rows(40), shard_rows=9)
    mixture = cache.read_mixture("train")
    assert mixture.block_rows == 16
    blocks = [mixture.table.block(number) for number in range(3)]
    assert [len(block.keys) for block in blocks] == [16, 16, 8]
    for name, column in (("keys", "example_key"), ("shards", "shard"), ("rows", "row")):
        whole = mixture.table.column(column)
        assert (np.concatenate([getattr(block, name) for block in blocks]) == whole).all()
    assert (np.concatenate([block.lengths for block in blocks]) == mixture.shared_prefix_lengths()).all()


def test_pairs_that_no_shard_holds_are_counted_and_named(cache: ReferenceCache) -> None:
    rows = make_rows(20)
    cache.shards.write(rows[:5])
    with pytest.raises(DpoCacheError, match="15 pairs of mixture train are in no shard") as caught:
        write(cache, mixture_rows(rows))
    assert caught.value.found.endswith("…")
    assert sum(row.key.hex() in caught.value.found for row in rows) == 10
    assert cache.mixture_names() == []
    with pytest.raises(DpoCacheError, match="would have no pairs"):
        write(cache, mixture_rows(rows).take(np.arange(0)))


@pytest.mark.parametrize("name", ["train", "a", "7", "A.b_c-d", "x" * 128])
def test_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a\0", "a b", "ü", "x" * 129, "a\n"])
def test_names_that_could_mean_another_file_are_refused(cache: ReferenceCache, name: str) -> None:
    for use in (check_name, cache.read_mixture, cache.retire_mixture, cache.building):
        with pytest.raises(DpoCacheError, match="cannot name a mixture"):
            use(name)


POINTER_LIES: list[tuple[str, Any, str]] = [
    ("format_version", 2, "has format version 2"),
    ("format_version", None, "has format version None"),
    ("name", "other", "holds the mixture 'other'"),
    ("digest", "abc", "'digest' is not a SHA-256"),
    ("digest", "A" * 64, "'digest' is not a SHA-256"),
    ("reference_id", "../x", "'reference_id' is not a SHA-256"),
    ("reference_id", "0" * 64, "belongs to another reference"),
    ("num_pairs", 0, "'num_pairs' is 0"),
    ("num_pairs", 2**60, "'num_pairs' is out of range"),
    ("num_pairs", "9", "'num_pairs' is not what it must be"),
    ("block_rows", -1, "'block_rows' is out of range"),
    ("num_ids", {"prompt": 1}, "'chosen' is not what it must be"),
    ("shards", [["../../etc/passwd", 1, 1]], "'sha256' is not a SHA-256"),
    ("shards", [["a" * 64, 1]], "is not \\[sha256, rows, bytes\\]"),
    ("shards", {"a": 1}, "'shards' is not what it must be"),
    ("table", {"sha256": "/etc/passwd", "num_bytes": 1}, "'sha256' is not a SHA-256"),
    ("table", None, "'table' is not what it must be"),
    ("sources", ["x"], "'sources' must hold objects"),
    ("sources", [{"dropped": {"too-long": "3"}}], "'too-long' is not what it must be"),
    ("sources", [{"truncated": {"chosen": "3"}}], "'chosen' is not what it must be"),
    ("dropped", {"too-long": "3"}, "'too-long' is not what it must be"),
    ("tokenization", [], "'tokenization' is not what it must be"),
    ("tokenization", {"settings": 5}, "'settings' of 'tokenization' must be an object"),
    ("tokenization", {"settings": {"tokenizer": 7}}, "'tokenizer' of 'settings' must be a text"),
    ("tokenization", {"chat_template": {"text": ["a"]}}, "'text' of 'chat_template' must be a text"),
    ("tokenization", {"chat_template": "tulu"}, "'chat_template' of 'tokenization' must be an object"),
]


@pytest.mark.parametrize(("field", "value", "message"), POINTER_LIES)
def test_a_pointer_that_lies_is_refused(cache: ReferenceCache, field: str, value: Any, message: str) -> None:
    fill_cache(cache, make_rows(5), shard_rows=5)
    path = cache.path / "mixtures" / "train.json"
    pointer = read_sealed_json(path, max_bytes=10**6)
    write_sealed_json(path, pointer | {field: value}, temporary_folder=cache.path / "tmp")
    with pytest.raises(DpoCacheError, match=message):
        cache.read_mixture("train")


@pytest.mark.parametrize(("field", "value"), [("num_pairs", 4), ("num_pairs", 2**50), ("block_rows", 1)])
def test_a_table_with_other_rows_or_blocks_than_the_pointer_states_is_refused(
    cache: ReferenceCache, field: str, value: int
) -> None:
    fill_cache(cache, make_rows(5), shard_rows=5)
    path = cache.path / "mixtures" / "train.json"
    pointer = read_sealed_json(path, max_bytes=10**6)
    write_sealed_json(path, pointer | {field: value}, temporary_folder=cache.path / "tmp")
    with pytest.raises(DpoCacheError, match="does not have the rows or blocks"):
        cache.read_mixture("train").table.verify()


def test_every_flipped_bit_of_the_table_is_found(cache: ReferenceCache) -> None:
    table = fill_cache(cache, make_rows(3), shard_rows=3).table
    whole = table.path.read_bytes()
    for place in np.random.RandomState(0).choice(len(whole) * 8, size=200, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        table.path.write_bytes(damaged)
        with pytest.raises(DpoCacheError, match="is damaged"):
            cache.read_mixture("train").table.column("row")

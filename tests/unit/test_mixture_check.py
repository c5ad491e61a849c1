"""Nothing is trained from a mixture that is not whole; the message says how many pairs and which."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows, read_shard
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import mixture_check, mixture_table, shard_writer
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.mixture_check import check_mixture
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.cache.shard_file import ShardRef


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return make_cache(tmp_path / "cache")


@pytest.fixture(params=["hashed at once", "hashed when read"])
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All but damage inside a page must be found without hashing too: a big cache is not hashed up front."""
    if request.param == "hashed when read":
        monkeypatch.setattr(mixture_check, "HASH_AT_ONCE_BYTES", -1)
    return str(request.param)


def unchecked_shard(cache: ReferenceCache, rows: list[ScoredPair], monkeypatch: pytest.MonkeyPatch) -> ShardRef:
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "refuse_unusable_values", lambda rows: None)
        return cache.shards.write(rows)


def test_a_whole_mixture_passes_with_and_without_repeats(cache: ReferenceCache, hashing: str) -> None:
    check_mixture(cache, fill_cache(cache, make_rows(50), shard_rows=12))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 0.25])
@pytest.mark.parametrize("field", ["ref_chosen_logps", "ref_rejected_logps"])
def test_values_no_reference_gives_are_counted_and_named(
    cache: ReferenceCache, hashing: str, monkeypatch: pytest.MonkeyPatch, field: str, value: float
) -> None:
    rows = make_rows(30)
    changes: dict[str, Any] = {field: value}
    for number in (7, 20):
        rows[number] = dataclasses.replace(rows[number], **changes)
    unchecked_shard(cache, rows, monkeypatch)
    index = cache.shards.key_index()
    mixture = cache.write_mixture(
        "train", mixture_rows(rows), key_index=index, tokenization={}, sources=[{}], dropped={}
    )
    with pytest.raises(DpoCacheError, match="2 pairs of mixture train have reference values") as caught:
        check_mixture(cache, mixture)
    assert rows[7].key.hex() in caught.value.found
    assert rows[20].key.hex() in caught.value.found


def test_a_bad_row_that_the_mixture_does_not_use_is_no_matter(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(10)
    unchecked_shard(cache, [dataclasses.replace(rows[0], ref_chosen_logps=float("nan")), *rows[1:]], monkeypatch)
    asked = mixture_rows(rows).take(np.arange(1, 10))
    index = cache.shards.key_index()
    check_mixture(
        cache,
        cache.write_mixture("train", asked, key_index=index, tokenization={}, sources=[{}], dropped={}),
    )


def test_counts_below_one_are_refused(cache: ReferenceCache, hashing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(10)
    rows[3] = dataclasses.replace(rows[3], chosen_tokens=0)
    unchecked_shard(cache, rows, monkeypatch)
    index = cache.shards.key_index()
    mixture = cache.write_mixture(
        "train", mixture_rows(rows), key_index=index, tokenization={}, sources=[{}], dropped={}
    )
    with pytest.raises(DpoCacheError, match=f"1 pairs of mixture train .*{rows[3].key.hex()}"):
        check_mixture(cache, mixture)


def rows_of_first_shard(mixture: Mixture) -> int:
    return int((mixture.table.column("shard") == 0).sum())


def test_a_missing_shard_is_named_with_the_pairs_it_held(cache: ReferenceCache, hashing: str) -> None:
    mixture = fill_cache(cache, make_rows(50), shard_rows=12)
    cache.shards.paths()[0].unlink()
    lacking = rows_of_first_shard(mixture)
    with pytest.raises(DpoCacheError, match=f"lacks {lacking} pairs .*is missing") as caught:
        check_mixture(cache, cache.read_mixture("train"))
    assert "dpo-cache verify --repair" in str(caught.value)


def test_the_pairs_of_all_missing_and_damaged_shards_are_counted(cache: ReferenceCache, hashing: str) -> None:
    fill_cache(cache, make_rows(50), shard_rows=12)
    missing, cut, *_ = cache.shards.paths()
    lacking = {row.key.hex() for path in (missing, cut) for row in read_shard(path)}
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(DpoCacheError) as caught:
        check_mixture(cache, cache.read_mixture("train"))
    found = caught.value.found
    assert found.startswith(f"mixture train lacks {len(lacking)} pairs (")
    assert found.endswith("(the first of 2 such shards)")
    named = found[found.index("(") + 1 : found.index(", …)")].split(", ")
    assert len(named) == 10
    assert set(named) <= lacking


def test_a_truncated_shard_is_refused(cache: ReferenceCache, hashing: str) -> None:
    mixture = fill_cache(cache, make_rows(50), shard_rows=12)
    path = cache.shards.paths()[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DpoCacheError, match=r"lacks \d+ pairs .*(damaged|cut short)"):
        check_mixture(cache, mixture)


def test_a_flipped_bit_anywhere_is_found_before_training_where_the_cache_is_of_ordinary_size(
    cache: ReferenceCache,
) -> None:
    mixture = fill_cache(cache, make_rows(3), shard_rows=3)
    path = cache.shards.paths()[0]
    whole = path.read_bytes()
    for place in np.random.RandomState(0).choice(len(whole) * 8, size=100, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DpoCacheError, match="is damaged"):
            check_mixture(cache, mixture)


def test_another_shard_in_the_place_of_the_right_one_is_refused(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_check, "HASH_AT_ONCE_BYTES", -1)
    mixture = fill_cache(cache, make_rows(20), shard_rows=10)
    one, other = cache.shards.paths()
    one.write_bytes(other.read_bytes())
    with pytest.raises(DpoCacheError, match=r"rows and \d+ bytes|holds other keys"):
        check_mixture(cache, mixture)


@pytest.mark.parametrize("change", [{"digest": "0" * 64}, {"shards": []}])
def test_a_pointer_that_does_not_fit_its_table_is_refused(cache: ReferenceCache, change: dict[str, object]) -> None:
    mixture = fill_cache(cache, make_rows(20), shard_rows=10)
    with pytest.raises(DpoCacheError, match=r"not the training set|does not list"):
        check_mixture(cache, dataclasses.replace(mixture, **change))  # type: ignore[arg-type]


def test_places_beyond_a_shard_and_lengths_below_one_are_refused(cache: ReferenceCache, hashing: str) -> None:
    rows = make_rows(20)
    cache.shards.write(rows)
    index = cache.shards.key_index()
    for changed, asked, message in (
        ({"rows": index.rows + 20}, mixture_rows(rows), "is asked for"),
        ({"rows": np.roll(index.rows, 1)}, mixture_rows(rows), "holds other keys in 20"),
        ({}, dataclasses.replace(mixture_rows(rows), chosen_lengths=np.zeros(20, np.int32)), "chosen_length below 1"),
    ):
        mixture = cache.write_mixture(
            "x",
            asked,
            key_index=dataclasses.replace(index, **changed),  # type: ignore[arg-type]
            tokenization={},
            sources=[{}],
            dropped={},
        )
        with pytest.raises(DpoCacheError, match=message):
            check_mixture(cache, mixture)


def test_memory_for_a_check_hardly_grows_with_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By less than half a key a pair: the table is never held at once. (What pyarrow holds is not counted.)"""
    monkeypatch.setattr(mixture_check, "ROWS_AT_ONCE", 512)
    monkeypatch.setattr(mixture_table, "BLOCK_ROWS", 128)

    def peak(num_rows: int) -> int:
        cache = make_cache(tmp_path / str(num_rows))
        made = fill_cache(cache, make_rows(num_rows), shard_rows=256)
        peaks = []
        for _ in range(3):  # what else the process allocates meanwhile is not the check's
            tracemalloc.start()
            check_mixture(cache, made)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(peaks)

    small, large = peak(1_000), peak(6_000)
    assert large - small < 5_000 * 16

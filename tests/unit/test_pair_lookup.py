"""Single pairs by key or by tokens, and a mixture's pairs one after another, as other trainers ask for them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import dpo_cache
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.pipeline.cache.pair_lookup import PairLookup
from dpo_cache.pipeline.cache.pair_order import epoch_order
from dpo_cache.pipeline.data.token_pair import canonical_scored_mask
from dpo_cache.stages.show import show


def test_every_pair_is_found_by_its_key_and_by_its_tokens_and_mask(tmp_path: Path) -> None:
    rows = make_rows(60)
    fill_cache(make_cache(tmp_path / "cache"), rows, shard_rows=7)
    cache = dpo_cache.ReferenceCache.open(str(tmp_path / "cache"))
    for row in rows:
        pair = row.pair
        mask = None if pair.scored_mask is None else pair.scored_mask.tolist()
        by_tokens = cache.find_tokens(
            pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist(), mask
        )
        for found in (cache.find(row.key), by_tokens):
            assert found is not None
            assert (found.key, found.ref_chosen_logps) == (row.key, row.ref_chosen_logps)
        if canonical_scored_mask(pair) is not None:
            assert cache.find_tokens(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) is None
    assert cache.find(bytes(32)) is None


def test_a_pair_in_no_mixture_and_one_in_two_shards_is_found_once(tmp_path: Path) -> None:
    rows = make_rows(20)
    cache = make_cache(tmp_path / "cache")
    cache.shards.write(rows[:15])
    cache.shards.write(rows[5:])
    for row in rows:
        found = cache.find(row.key)
        assert found is not None
        assert found.ref_rejected_logps == row.ref_rejected_logps


def test_what_cannot_be_looked_up_is_said(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(DpoCacheError, match="a key of 31 bytes"):
        cache.find(bytes(31))
    with pytest.raises(DpoCacheError, match="the mask has 2 entries for 3 tokens"):
        cache.find_tokens([1], [2], [3], [False, True])


def test_a_mixture_is_iterated_in_its_order_or_in_that_of_an_epoch_with_repeats(tmp_path: Path) -> None:
    rows = make_rows(50)
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, rows, shard_rows=20)
    twice = MixtureRows.concatenate([mixture_rows(rows), mixture_rows(rows[:10])])
    described: dict[str, Any] = {"tokenization": {}, "sources": [{}], "dropped": {}}
    mixture = cache.write_mixture("twice", twice, key_index=cache.shards.key_index(), **described)
    in_order = [row.key for row in cache.pairs("twice")]
    keys = mixture.table.column("example_key")
    assert in_order == [bytes(key).ljust(32, b"\0") for key in keys]
    assert len(in_order) == 60
    order = epoch_order(num_pairs=60, block_rows=mixture.block_rows, seed=3, epoch=1, mixture_digest=mixture.digest)
    assert [row.key for row in cache.pairs("twice", seed=3, epoch=1)] == [in_order[place] for place in order]


def test_importing_the_package_stays_light() -> None:
    program = "import sys, dpo_cache; print([m for m in ('numpy', 'pyarrow', 'torch') if m in sys.modules])"
    program += "; dpo_cache.ReferenceCache; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = dpo_cache.Nothing


def test_a_key_is_named_by_how_it_begins(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    rows = make_rows(40)
    fill_cache(cache, rows, shard_rows=7)
    keys = sorted({row.key for row in rows})
    with closing(PairLookup(cache)) as lookup:
        for digits in ("", "0", "f", keys[0].hex()[:2], keys[-1].hex()[:7], keys[20].hex()):
            assert lookup.keys_beginning_with(digits) == [key for key in keys if key.hex().startswith(digits)]


def test_a_shard_whose_bytes_are_not_those_of_its_name_is_not_shown_by_key(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    rows = make_rows(4)
    shard = cache.shards.path_of(cache.shards.write(rows))
    shard.rename(shard.with_name(f"{'0' * 64}.parquet"))
    with pytest.raises(DpoCacheError, match="is damaged: its bytes have the SHA-256"):
        show(cache.path, mixture_name=None, key=rows[0].key.hex())

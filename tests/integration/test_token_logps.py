"""Log-probabilities per token: scored where they are asked for, kept through everything that tidies a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows, read_shard
from commands import dpo_cache, run
from commands_in_process import invoke, refusal, report
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.canonical_json import read_sealed_json, write_sealed_json
from tiny_model import message_pairs, plain_token_logps, write_rows

from .conftest import NUM_PAIRS


@pytest.fixture(scope="module")
def detailed(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, reference: Path, pairs_file: Path) -> Path:
    """The cache of the forty pairs, built again with values per token."""
    cache = tmp_path_factory.mktemp("detailed") / "cache"
    shutil.copytree(shared_cache, cache)
    command = ("build", "--model", reference, "--dataset", pairs_file, "--cache", cache, "--token-logps")
    planned = report(*command, "--dry-run")
    explained = report("explain", cache, *command[1:5], "--token-logps")
    assert (explained["pairs_reused"], explained["pairs_without_token_logps"]) == (0, NUM_PAIRS)
    (source,) = explained["sources"]  # the tokens are in the cache; only the values per token are not
    assert (source["rows_reused"], source["rows_with_known_tokens"], source["rows_unknown"]) == (0, NUM_PAIRS, [])
    built = run(dpo_cache(*command))
    for counted in (planned, built):
        assert (counted["pairs_scored"], counted["pairs_reused"]) == (NUM_PAIRS, 0)
    again = report(*command)
    assert (again["pairs_scored"], again["reference_forwards"]) == (0, 0)
    return cache


def test_the_values_are_those_of_a_plain_forward_and_add_up_to_the_sums(detailed: Path, reference: Path) -> None:
    rows = list(ReferenceCache.open(detailed).pairs("train"))
    assert len(rows) == NUM_PAIRS
    for row in rows:
        common = min(row.chosen_tokens, row.rejected_tokens)
        for side in ("chosen", "rejected"):
            values, answer = getattr(row, f"{side}_token_logps"), getattr(row.pair, f"{side}_ids").tolist()
            plain = plain_token_logps(reference, row.pair.prompt_ids.tolist(), answer)
            np.testing.assert_allclose(values, plain, rtol=1e-4, atol=1e-5)
            assert values.sum(dtype=np.float64) == pytest.approx(getattr(row, f"ref_{side}_logps"), rel=1e-6)
            of_common = values[:common].sum(dtype=np.float64)
            assert of_common == pytest.approx(getattr(row, f"ref_{side}_common_logps"), rel=1e-6)


def test_info_show_verify_and_export_know_them(detailed: Path, shared_cache: Path, tmp_path: Path) -> None:
    for cache, has_them in ((detailed, True), (shared_cache, False)):
        assert report("info", cache)["mixtures"]["train"]["token_logps"] is has_them
        assert ("log-probability of each scored token" in invoke("info", cache).stdout) is has_them
        (pair,) = report("show", cache, "-n", 1)["pairs"]
        assert (pair["ref_chosen_token_logps"] is not None) is has_them
        report("export", cache, tmp_path / f"{has_them}.parquet")
    found = report("verify", detailed, "--rescore", 10)
    assert (found["mixtures"], found["duplicates"]) == ({"train": NUM_PAIRS}, NUM_PAIRS)


def test_a_build_without_them_leaves_them_and_compact_drops_the_rows_without(
    detailed: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(detailed, cache)
    report("build", "--model", reference, "--dataset", pairs_file, "--cache", cache)
    assert report("compact", cache)["dropped_rows"] == NUM_PAIRS
    opened = ReferenceCache.open(cache)
    assert opened.read_mixture("train").has_token_logps
    assert all(row.has_token_logps for path in opened.shards.paths() for row in read_shard(path))
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}
    more = write_rows(tmp_path / "more.jsonl", message_pairs(3, seed=8))
    command = dpo_cache("build", "--model", reference, "--dataset", more, "--cache", cache, "--extend")
    run(command)
    assert not opened.read_mixture("train").has_token_logps
    assert run([*command, "--token-logps"])["pairs_scored"] == 3
    assert opened.read_mixture("train").has_token_logps


def test_merging_takes_the_rows_that_have_them(tmp_path: Path) -> None:
    caches = []
    for number, token_logps in enumerate((False, True)):
        caches.append(make_cache(tmp_path / str(number)))
        fill_cache(caches[-1], make_rows(12, token_logps=token_logps), shard_rows=5)
    report("merge", *(cache.path for cache in caches), "--cache", tmp_path / "merged")
    assert ReferenceCache.open(tmp_path / "merged").read_mixture("train").has_token_logps


def test_a_pointer_that_promises_them_in_vain_is_found(shared_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(shared_cache, cache)
    pointer = cache / "mixtures/train.json"
    described = read_sealed_json(pointer, max_bytes=1 << 20)
    write_sealed_json(pointer, {**described, "token_logps": True}, temporary_folder=cache / "tmp")
    (finding,) = report("verify", cache, exit_code=1)["findings"]
    assert "has no log-probabilities per token, which the pointer train.json states" in finding["detail"]
    write_sealed_json(pointer, {**described, "token_logps": "yes"}, temporary_folder=cache / "tmp")
    assert "'token_logps' is not what it must be" in refusal("info", cache)
    assert "token_logps" not in json.loads((shared_cache / "mixtures/train.json").read_bytes())

"""What a build makes of a mixture of its name that is whole, damaged, described otherwise, extended or lossy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.building.mixture_change import left_out_before, mixture_content
from dpo_cache.stages.building.mixture_content import MixtureContent
from dpo_cache.stages.building.pair_collection import CollectedPairs, SpooledPairs

ROWS = make_rows(12)
SOURCE = {"path": "made up", "dropped": {"empty-response": 3}}
TOKENIZATION = {"tokenizer": "made up"}


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    made = make_cache(tmp_path / "cache")
    fill_cache(made, ROWS, shard_rows=4)
    write(made, collected())
    return made


def write(cache: ReferenceCache, pairs: CollectedPairs) -> None:
    pairs.content.write(cache, "train", key_index=cache.shards.key_index())


def collected(
    rows: list[ScoredPair] = ROWS, *, source: dict[str, Any] = SOURCE, tokenization: dict[str, Any] = TOKENIZATION
) -> CollectedPairs:
    """Rows of one dataset, all of them known to the cache."""
    columns = mixture_rows(rows)
    nothing = np.arange(0)
    waiting = SpooledPairs(
        spool_indices=nothing,
        keys=columns.example_keys[:0],
        prompt_hashes=columns.prompt_hashes[:0],
        lengths=nothing,
    )
    return CollectedPairs(
        content=MixtureContent(rows=columns, tokenization=tokenization, sources=[source], is_new=True),
        waiting=waiting,
        num_distinct=len(rows),
        num_source_rows=len(rows),
    )


def content_of(cache: ReferenceCache, pairs: CollectedPairs | None = None, **options: Any) -> MixtureContent:
    """What these pairs, or the same twelve again, come to."""
    config = BuildConfig(model="m", dataset=("d",), cache=cache.path, **options)
    return mixture_content(cache, config, (pairs or collected()).content, known=cache.shards.key_index())


@pytest.mark.parametrize("extend", [False, True])
def test_a_whole_mixture_of_the_same_pairs_is_left_alone(
    cache: ReferenceCache, extend: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not content_of(cache, extend=extend).is_new
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("extend", [False, True])
def test_one_that_names_a_shard_which_is_gone_is_written_again(cache: ReferenceCache, extend: bool) -> None:
    cache.shards.paths()[1].unlink()
    content = content_of(cache, extend=extend)
    assert content.is_new
    assert len(content.rows) == 12


@pytest.mark.parametrize("pattern", ["train.json", "*.parquet"])
def test_a_damaged_one_is_written_anew_with_a_warning_but_not_extended(
    cache: ReferenceCache, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (cache.path / "mixtures").glob(pattern):
        path.write_bytes(path.read_bytes()[:-1])
    assert content_of(cache).is_new
    (warning,) = capsys.readouterr().err.splitlines()
    assert "warning: mixture train is written anew" in warning
    assert "is damaged" in warning
    with pytest.raises(DpoCacheError, match="is damaged"):
        content_of(cache, extend=True)


def test_one_whose_table_is_damaged_gives_way_to_other_pairs_only_if_asked_to(cache: ReferenceCache) -> None:
    for table in (cache.path / "mixtures").glob("*.parquet"):
        table.write_bytes(table.read_bytes()[:-1])
    others = collected(ROWS[:5])
    with pytest.raises(DpoCacheError, match=r"has other training pairs \(12\) than this build makes \(5\)") as refused:
        content_of(cache, others)
    assert "from its own datasets: --dataset 'made up'; to put these" in str(refused.value.next_step)
    assert len(content_of(cache, others, replace=True).rows) == 5


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        {"tokenization": {**TOKENIZATION, "settings": {"max_seq_length": 4096}}},
        {"source": {**SOURCE, "path": "moved"}},
        {"source": {**SOURCE, "dropped": {}}},
    ],
)
def test_the_same_pairs_described_otherwise_are_described_anew_and_can_then_be_extended(
    cache: ReferenceCache, replace: bool, changed: dict[str, Any]
) -> None:
    digest = cache.read_mixture("train").digest
    content = content_of(cache, collected(**changed), replace=replace)
    assert content.is_new
    content.write(cache, "train", key_index=cache.shards.key_index())
    written = cache.read_mixture("train")
    assert (written.digest, written.tokenization, written.sources) == (digest, content.tokenization, content.sources)
    assert written.dropped == content.sources[0]["dropped"]
    assert not content_of(cache, collected(**changed)).is_new
    more = collected(ROWS[:2], source={"path": "more"}, tokenization=content.tokenization)
    assert len(content_of(cache, more, extend=True).rows) == 14


def test_extending_adds_every_row_of_another_dataset_and_counts_those_that_are_there(cache: ReferenceCache) -> None:
    """The other dataset shares four pairs with the mixture; one build of both would train on them twice."""
    other = collected(ROWS[:4], source={"path": "other", "dropped": {"empty-response": 1, "too-long": 2}})
    extended = content_of(cache, other, extend=True)
    assert (len(extended.rows), extended.already_there, extended.repeated) == (16, 0, 4)
    assert extended.dropped == {"empty-response": 4, "too-long": 2}
    extended.write(cache, "train", key_index=cache.shards.key_index())
    again = content_of(cache, other, extend=True)
    assert (len(again.rows), again.already_there, again.repeated, again.is_new) == (16, 4, 0, False)
    assert cache.read_mixture("train").num_distinct_pairs == 12


def test_the_refusal_of_other_pairs_says_which_of_them_extending_would_repeat(cache: ReferenceCache) -> None:
    more = make_rows(3, seed=5)
    larger_file, part_of_it = (collected(rows, source={"path": "other"}) for rows in (ROWS + more, ROWS[:4] + more))
    with pytest.raises(DpoCacheError, match="3 are new and 0 are gone") as caught:
        content_of(cache, larger_file)
    assert str(caught.value.next_step).startswith(
        "add --replace to have no other pairs than these, --extend to add them (12 that are there already are then "
        "trained on once more per epoch), or --mixture OTHER"
    )
    with pytest.raises(DpoCacheError, match="3 are new and 8 are gone") as caught:
        content_of(cache, part_of_it)
    assert "in place of the old ones, --extend to add them (4 that are there already" in str(caught.value.next_step)
    with pytest.raises(DpoCacheError, match="3 are new and 12 are gone") as caught:
        content_of(cache, collected(more, source={"path": "other"}))
    assert "--extend to add them, or --mixture OTHER" in str(caught.value.next_step)


def test_the_refusal_of_pairs_made_with_other_settings_does_not_send_the_user_to_extend(cache: ReferenceCache) -> None:
    """It did, and the command with ``--extend`` was refused in turn."""
    shorter = {**TOKENIZATION, "settings": {"max_seq_length": 512}}
    fewer = collected(make_rows(3, seed=5), source={"path": "other"}, tokenization=shorter)
    with pytest.raises(DpoCacheError, match="12 are gone; made with other settings: max_seq_length") as caught:
        content_of(cache, fewer)
    assert "--replace" in str(caught.value.next_step)
    assert "--extend" not in f"{caught.value.expected} {caught.value.next_step}"
    with pytest.raises(DpoCacheError, match="was made with other tokens"):
        content_of(cache, fewer, extend=True)


def test_a_mixture_that_lost_pairs_is_not_extended_and_its_datasets_are_named(cache: ReferenceCache) -> None:
    write(cache, collected(source={**SOURCE, "path": "old.jsonl", "split": "test", "amount": "12"}))
    lost = cache.shards.key_index().keys[cache.shards.key_index().shard_numbers == 0]
    cache.shards.paths()[0].unlink()
    other = collected(ROWS[:0] + make_rows(3, seed=5), source={"path": "other"})
    with pytest.raises(DpoCacheError, match="4 pairs of mixture train are in no shard") as caught:
        content_of(cache, other, extend=True)
    assert all(key.hex() in caught.value.found for key in lost.tolist())
    assert "--replace --dataset old.jsonl,split=test,amount=12 …" in str(caught.value.next_step)


# ---- pairs that are left out -----------------------------------------------------------------------------------------


def test_pairs_that_are_left_out_are_recorded_so_that_the_same_build_knows_them_again(cache: ReferenceCache) -> None:
    bad = {
        "no-finite-logps": mixture_rows(ROWS[2:5]).example_keys,
        "probability-one": mixture_rows(ROWS[7:8]).example_keys,
    }
    content = content_of(cache).without(bad)
    content = MixtureContent(rows=content.rows, tokenization=content.tokenization, sources=content.sources, is_new=True)
    content.write(cache, "train", key_index=cache.shards.key_index())
    written = cache.read_mixture("train")
    assert (written.num_pairs, written.dropped) == (
        8,
        {"empty-response": 3, "no-finite-logps": 3, "probability-one": 1},
    )

    config = BuildConfig(model="m", dataset=("d",), cache=cache.path, drop_nonfinite=True)
    again = left_out_before(cache, config, collected())
    assert (len(again.content.rows), again.num_distinct, again.content.dropped) == (8, 8, written.dropped)
    assert not content_of(cache, again, drop_nonfinite=True).is_new
    with pytest.raises(DpoCacheError, match="4 are new") as caught:
        content_of(cache)
    assert "--drop-nonfinite to leave out 4 as before" in str(caught.value.next_step)


def test_what_an_extension_leaves_out_adds_to_what_was_left_out_before(cache: ReferenceCache) -> None:
    first = collected().without({"no-finite-logps": mixture_rows(ROWS[:2]).example_keys})
    write(cache, first)
    other = collected(ROWS[4:9], source={"path": "other", "dropped": {}})
    extended = content_of(cache, other, extend=True)
    extended = extended.without({"no-finite-logps": mixture_rows(ROWS[8:9]).example_keys})
    assert extended.dropped == {"empty-response": 3, "no-finite-logps": 2 + 2}, "the pair stands in both datasets"
    assert len(extended.rows) == 10 + 5 - 2

"""Mixtures of several datasets, splits and amounts, several of them in one cache, and when one is written."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import logps_by_key, shard_rows
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.data.dataset_source import open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.stages.build import build
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.scoring.scoring_job import lead_scoring
from tiny_model import message_pairs, rendered_pair, write_rows
from transformers import AutoTokenizer


def test_datasets_splits_and_amounts_make_mixtures_that_share_the_rows_of_one_cache(
    reference: Path, tmp_path: Path
) -> None:
    """The two files of the folder are splits; the other file begins with six rows of the train split."""
    rows = message_pairs(60)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", rows[:20])
    write_rows(tmp_path / "data" / "test.jsonl", rows[20:30])
    write_rows(tmp_path / "other.jsonl", rows[14:20] + rows[30:40])
    data, other, cache = tmp_path / "data", tmp_path / "other.jsonl", tmp_path / "cache"

    def built(name: str, *specs: str) -> tuple[int, int]:
        """Pairs scored and pairs reused; the mixture is checked to have just the rows that its sources picked."""
        report = build(BuildConfig(model=str(reference), dataset=specs, cache=cache, mixture=name))
        assert report is not None
        mixture = ReferenceCache.open(cache).read_mixture(name)
        picked = Counter(
            (number, row)
            for number, spec in enumerate(specs)
            for row in open_dataset(DatasetSpec.parse(spec)).picked_rows.tolist()
        )
        columns = mixture.rows()
        assert Counter(zip(columns.sources.tolist(), columns.source_rows.tolist(), strict=True)) == picked
        assert [source["picked_rows"] for source in mixture.sources] == [
            sum(times for (number, _), times in picked.items() if number == source) for source in range(len(specs))
        ]
        assert report.training_pairs == mixture.num_pairs == picked.total()
        assert len(set(columns.example_keys.tolist())) == mixture.num_distinct_pairs == report.distinct_pairs
        return report.pairs_scored, report.pairs_reused

    assert built("all", f"{data},amount=1.5", f"{data},split=test,amount=4", f"{other},amount=0.5") == (
        len(logps_by_key(cache)),
        0,
    )
    before = len(logps_by_key(cache))
    scored, reused = built("others", f"{data},split=train[:10]", f"{other},amount=35")
    assert reused >= 16  # ten of the split, six of the file
    assert len(logps_by_key(cache)) == before + scored
    assert built("held-out", f"{other}") == (0, 16)
    assert ReferenceCache.open(cache).mixture_names() == ["all", "held-out", "others"]


def test_datasets_of_several_formats_are_each_read_in_their_own_way_and_columns_that_are_not_used_are_listed(
    reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of messages, one of plain text; each has columns that the other lacks."""
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    conversations = message_pairs(3)
    write_rows(chats, [{**row, "score": number, "tools": None} for number, row in enumerate(conversations)])
    write_rows(texts, [{"prompt": f"{n}:", "chosen": f" yes {n}", "rejected": " no", "tools": "x"} for n in range(3)])
    cache = tmp_path / "cache"
    build(BuildConfig(model=str(reference), dataset=(str(chats), str(texts)), cache=cache))
    said = capfd.readouterr().err
    assert f"{chats}: columns that are not used: score\n" in said
    assert f"{texts}: columns that are not used: tools\n" in said

    tokenizer = AutoTokenizer.from_pretrained(reference)
    plain = [
        tuple(tokenizer(text).input_ids for text in (f"{n}:", f" yes {n}<|endoftext|>", " no<|endoftext|>"))
        for n in range(3)
    ]
    expected = [*(rendered_pair(reference, row) for row in conversations), *plain]
    rows = shard_rows(cache).to_pylist()
    found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    assert sorted(found) == sorted(expected)


def test_a_mixture_is_written_once_a_shared_file_system_shows_the_shards_of_other_machines(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"

    def lead_slow_machines(*given: Any, **options: Any) -> Any:
        outcome = lead_scoring(*given, **options)
        (shard,) = (cache / "shards").iterdir()
        shard.rename(elsewhere)
        threading.Timer(0.5, elsewhere.rename, [shard]).start()
        return outcome

    monkeypatch.setattr("dpo_cache.stages.build.lead_scoring", lead_slow_machines)
    dataset = write_rows(tmp_path / "pairs.jsonl", message_pairs(4))
    report = build(BuildConfig(model=str(reference), dataset=(str(dataset),), cache=cache))
    assert report is not None
    assert report.training_pairs == 4

"""The closing lines of a build: each number with what it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dpo_cache.stages.building.build_report import BuildReport

REPORT = BuildReport(
    cache=Path("cache"),
    mixture="train",
    dry_run=False,
    training_pairs=97,
    already_there=0,
    pairs_repeated=0,
    distinct_pairs=96,
    pairs_reused=0,
    pairs_scored=96,
    reference_forwards=9,
    tokens=4048,
    seconds=8.04,
    scoring_seconds=5.5,
    forward_seconds=0.7,
    forward_share=0.98,
    dropped={"identical-responses": 2},
    truncated={},
    usable_rows=97,
    warnings=("worker 1 died",),
)


def test_what_was_scored_is_told_with_one_time_and_what_is_in_it() -> None:
    assert REPORT.summary().splitlines()[:4] == [
        "warning: worker 1 died",
        "skipped rows: 2 identical-responses",
        "scored 96 pairs (4,048 tokens) in 9 forward passes, 5.5 s with start-up; reused 0 pairs",
        "mixture train: 97 pairs; the build took 8.0 s",
    ]


def test_what_was_cut_is_told_beside_what_was_skipped() -> None:
    said = replace(REPORT, truncated={"chosen": 28, "either": 30, "rejected": 26}).summary().splitlines()
    assert said[1:3] == [
        "skipped rows: 2 identical-responses",
        "cut: 28 chosen and 26 rejected responses in 30 of 97 rows",
    ]
    assert "cut: the prompt in 12 of 97 rows" in replace(REPORT, truncated={"prompt": 12}).summary()


def test_one_pair_is_not_written_as_several() -> None:
    said = replace(REPORT, pairs_scored=1, reference_forwards=1, pairs_reused=1, training_pairs=1).summary()
    assert "scored 1 pair (4,048 tokens) in 1 forward pass, 5.5 s with start-up; reused 1 pair" in said
    assert "mixture train: 1 pair;" in said


def test_added_pairs_that_are_trained_on_twice_are_a_warning() -> None:
    assert replace(REPORT, pairs_repeated=60).summary().splitlines()[2] == (
        "warning: 60 of the added pairs were already in mixture train: an epoch trains on them once more; to train "
        "on each once, build with --replace from data that has each once"
    )


def test_a_build_that_scored_nothing_says_why() -> None:
    said = replace(REPORT, pairs_scored=0, pairs_reused=96).summary()
    assert "nothing to score: all 96 pairs are in the cache; no weights were loaded" in said
    dry = replace(REPORT, dry_run=True, pairs_scored=24).summary()
    assert dry.splitlines()[-1] == "would score 24 pairs and reuse 0; nothing was loaded or written"

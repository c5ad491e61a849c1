"""Mixtures united: what one build of all their datasets would have, in whatever order they come."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from dpo_cache.pipeline.cache.example_key import keys_array
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.stages.building.mixture_content import MixtureContent
from dpo_cache.stages.building.mixture_union import canonical_order, united


def record(name: str, *, rows: int = 6, picked: int | None = None, **more: Any) -> dict[str, Any]:
    """What a build records of a local file."""
    files = [{"name": f"{name}.jsonl", "sha256": name * 8, "num_bytes": 1}]
    amounts = {"num_rows": rows, "picked_rows": picked or rows, "dropped": {"empty-response": ord(name[0])}}
    return {"path": f"{name}.jsonl", "split": "train", "config": None, "amount": None, "files": files} | amounts | more


def built(*sources: dict[str, Any]) -> MixtureContent:
    """What one build of datasets comes to. Datasets share some pairs, and one may hold a pair twice."""
    parts = []
    for number, source in enumerate(sources):
        picked = np.arange(source["picked_rows"]) % source["num_rows"]
        name = source["files"][0]["name"] if "files" in source else source["path"]
        keys = np.random.RandomState(sum(map(ord, name))).randint(0, 9, source["num_rows"])[picked]
        parts.append(
            MixtureRows(
                example_keys=keys_array([bytes([key]) * 32 for key in keys.tolist()]),
                prompt_hashes=keys.astype(np.uint64),
                prompt_lengths=keys.astype(np.int32),
                chosen_lengths=keys.astype(np.int32),
                rejected_lengths=keys.astype(np.int32),
                sources=np.full(len(picked), number, dtype=np.int32),
                source_rows=picked,
            )
        )
    return MixtureContent(
        rows=MixtureRows.concatenate(parts), tokenization={"of": "all"}, sources=list(sources), is_new=True
    )


def counted(content: MixtureContent) -> Counter[tuple[str, int, bytes]]:
    """How often each row of each dataset stands there."""
    names = [source["path"].rpartition("/")[2] for source in content.sources]
    rows = content.rows
    return Counter(
        (names[source], row, key)
        for source, row, key in zip(
            rows.sources.tolist(), rows.source_rows.tolist(), rows.example_keys.tolist(), strict=True
        )
    )


A, B, C = record("a"), record("b"), record("c", picked=15)
HUB = {
    **{"path": "org/pairs", "split": "train", "config": None, "amount": None, "revision": "main", "commit": "1" * 40},
    **{"num_rows": 4, "picked_rows": 4, "dropped": {}},
}


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([[A], [B]], [A, B]),
        ([[A, B], [B]], [A, B]),
        ([[A], [A]], [A]),
        ([[A, B], [B, C], [C, A]], [A, B, C]),
        ([[A, A], [A, B]], [A, A, B]),
        ([[A], [record("a", picked=12)]], [A, record("a", picked=12)]),
        ([[HUB, A], [B, HUB]], [HUB, A, B]),
    ],
)
def test_the_union_is_what_one_build_makes_in_whatever_order_the_parts_come(
    parts: list[list[dict[str, Any]]], whole: list[dict[str, Any]]
) -> None:
    expected = built(*whole)
    unions = [united(canonical_order([built(*part) for part in order])) for order in permutations(parts)]
    for union in unions:
        assert counted(union) == counted(expected)
        assert union.dropped == expected.dropped
        assert union.sources == unions[0].sources
        ours, first = (content.rows.in_mixture_order()[0] for content in (union, unions[0]))
        np.testing.assert_array_equal(ours.sources, first.sources)
        np.testing.assert_array_equal(ours.example_keys, expected.rows.in_mixture_order()[0].example_keys)


def test_uniting_in_steps_or_again_changes_nothing() -> None:
    a, b, c = built(A), built(B, B), built(C, A)
    at_once = united([a, b, c])
    for stepwise in (united([united([a, b]), c]), united([a, united([b, c])]), united([at_once, b, a])):
        assert counted(stepwise) == counted(at_once)
        assert stepwise.dropped == at_once.dropped


def test_a_dataset_is_told_by_its_bytes_and_a_hub_dataset_by_its_commit() -> None:
    elsewhere = {**A, "path": "/scratch/node7/a.jsonl", "amount": "1.0"}
    assert len(united([built(A), built(elsewhere)]).sources) == 1
    changed = {**A, "files": [{"name": "a.jsonl", "sha256": "other bytes", "num_bytes": 1}]}
    assert len(united([built(A), built(changed)]).sources) == 2
    assert len(united([built(HUB), built({**HUB, "revision": None})]).sources) == 1
    assert len(united([built(HUB), built({**HUB, "truncated": {"prompt": 1}})]).sources) == 1
    assert len(united([built(HUB), built({**HUB, "commit": "2" * 40})]).sources) == 2


def test_rows_that_an_older_mixture_lacks_of_a_dataset_are_added() -> None:
    whole = built(A)
    lacking = MixtureContent(
        rows=whole.rows.take(np.array([0, 3])), tokenization={"of": "all"}, sources=[A], is_new=False
    )
    assert counted(united([lacking, whole])) == counted(whole)

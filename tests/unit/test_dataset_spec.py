"""What ``--dataset`` means, and which rows an amount picks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("data.jsonl", DatasetSpec(path="data.jsonl")),
        ("org/name,split=test,amount=0.5", DatasetSpec(path="org/name", split="test", amount="0.5")),
        ("org/name,split=train[:10%]", DatasetSpec(path="org/name", split="train[:10%]")),
        (
            "org/name,split=a,config=b,revision=c,amount=1000",
            DatasetSpec(path="org/name", split="a", config="b", revision="c", amount="1000"),
        ),
    ],
)
def test_a_spec_is_read_and_given_back(text: str, spec: DatasetSpec) -> None:
    assert DatasetSpec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,speed=1", "'speed=1' is not understood"),
        ("a,split=", "'split=' is not understood"),
        ("a,amount=1,amount=2", "'amount=2' is not understood"),
        ("a,b", "'b' is not understood"),
        ("a,amount=half", "half is no amount"),
        ("a,amount=-1", "-1 is no amount"),
        ("a,amount=1e3", "1e3 is no amount"),
        (",split=test", "names no dataset"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        DatasetSpec.parse(text)


def test_a_path_with_a_comma_is_told_from_an_option(tmp_path: Path) -> None:
    (tmp_path / "a,b.jsonl").touch()
    with pytest.raises(DpoCacheError, match="is not understood") as error:
        DatasetSpec.parse(f"{tmp_path}/a,b.jsonl")
    assert "a path with a comma" in str(error.value.next_step)


@pytest.mark.parametrize(
    ("amount", "num_picked"),
    [(None, 7), ("3", 3), ("1", 1), ("7", 7), ("16", 16), ("0.5", 3), ("1.0", 7), ("2.0", 14), (".3", 2), ("1.", 7)],
)
def test_an_amount_is_a_share_with_a_dot_and_a_count_without(amount: str | None, num_picked: int) -> None:
    picked = DatasetSpec(path="a", amount=amount).pick_rows(7)
    assert len(picked) == num_picked
    assert picked.dtype == np.int64


def test_more_rows_than_there_are_repeat_whole_and_then_draw() -> None:
    # numpy freezes this generator's stream: RandomState(42).choice(7, size=2, replace=False)
    assert DatasetSpec(path="a", amount="16").pick_rows(7).tolist() == [*range(7), *range(7), 0, 1]


def test_fewer_rows_than_there_are_are_drawn_not_the_first() -> None:
    assert DatasetSpec(path="a", amount="4").pick_rows(7).tolist() == [0, 1, 5, 2]


@pytest.mark.parametrize(
    ("amount", "message"), [("0.1", "picks none of 7 rows"), ("1000000000000", "picks 1000000000000 rows of 7")]
)
def test_an_amount_that_picks_nothing_or_far_too_much_is_refused(amount: str, message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        DatasetSpec(path="a", amount=amount).pick_rows(7)

"""A shard gives back what was put in, is the same for the same rows, and hides no damage."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_factory import make_pair, make_row, make_rows, read_shard
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import shard_writer
from dpo_cache.pipeline.cache.example_key import example_key, key_at
from dpo_cache.pipeline.cache.scored_pair import VALUE_COLUMNS, ScoredPair, unusable_values
from dpo_cache.pipeline.cache.shard_file import (
    ShardReader,
    ShardRef,
    check_key,
    read_shard_rows,
    verify_shard,
)
from dpo_cache.pipeline.cache.shard_writer import write_shard
from dpo_cache.pipeline.data.token_pair import TokenPair, canonical_scored_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

once_a_function = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


def checked_rows(path: Path) -> Iterator[ScoredPair]:
    """All rows of a shard in order, each with its key computed again."""
    with ShardReader(path) as shard:
        for group in range(len(shard.group_starts)):
            rows = shard.read_row_group(group)
            for index in range(len(rows)):
                pair = rows.scored_pair(index)
                check_key(pair, path)
                yield pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "tmp").mkdir()
    return tmp_path / "shards"


def write(folder: Path, rows: Sequence[ScoredPair], *, recorded: dict[str, Any] | None = None) -> Path:
    shard = write_shard(
        folder,
        rows,
        reference_id="f" * 64,
        scoring_version=1,
        recorded=recorded or {},
        temporary_folder=folder.parent / "tmp",
    )
    return folder / shard.file_name


def is_possible(row: ScoredPair) -> bool:
    """Whether a reference can have given these values."""
    return not unusable_values({name: np.array([getattr(row, name)]) for name in VALUE_COLUMNS}).any()


def fields_of(row: ScoredPair) -> dict[str, Any]:
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "pair"}
    fields |= {field.name: getattr(row.pair, field.name) for field in dataclasses.fields(row.pair)}
    fields["scored_mask"] = canonical_scored_mask(row.pair)
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


@once_a_function
@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans())
def test_rows_come_back_as_they_were(folder: Path, seed: int, num_rows: int, token_logps: bool) -> None:
    rows = make_rows(num_rows, seed=seed, token_logps=token_logps)
    path = write(folder, rows)
    assert [fields_of(row) for row in read_shard(path)] == [fields_of(row) for row in rows]
    assert [fields_of(row) for row in checked_rows(path)] == [fields_of(row) for row in rows]
    with ShardReader(path) as shard:
        keys = shard.keys()
        assert shard.has_token_logps == token_logps
        assert shard.num_ids == sum(row.pair.shared_prefix_tokens for row in rows)
    assert [key_at(keys, index) for index in range(num_rows)] == [row.key for row in rows]


def test_some_rows_come_back_in_the_order_asked_for_across_row_groups(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "MAX_ROW_GROUP_PAIRS", 7)
    rows = make_rows(40)
    path = write(folder, rows)
    assert pq.ParquetFile(path).num_row_groups == 6
    wanted = [39, 0, 6, 7, 7, 21]
    assert [row.key for row in read_shard_rows(path, wanted)] == [rows[index].key for index in wanted]
    with pytest.raises(DpoCacheError, match="row 40 was asked for"):
        read_shard_rows(path, [40])


def test_row_groups_are_cut_by_token_ids_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MAX_ROW_GROUP_IDS", 30)
    rows = make_rows(20)
    path = write(folder, rows)
    file = pq.ParquetFile(path)
    lengths = [row.pair.shared_prefix_tokens for row in rows]
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        assert sum(lengths[start:stop]) <= 30 or stop == start + 1
        start = stop
    assert start == 20


def test_the_same_rows_are_the_same_bytes_under_the_digest_of_those_bytes(folder: Path) -> None:
    rows = make_rows(30)
    path = write(folder, rows)
    content = path.read_bytes()
    assert path.stem == hashlib.sha256(content).hexdigest()
    assert write(folder, make_rows(30)) == path
    assert path.read_bytes() == content
    assert write(folder, rows[::-1]) != path
    verify_shard(path)
    assert list((folder.parent / "tmp").iterdir()) == []


def test_a_mask_that_says_what_none_says_is_the_same_shard(folder: Path) -> None:
    row = make_rows(2)[1]
    assert row.pair.scored_mask is None
    mask = np.concatenate([row.pair.prompt_scored, row.pair.chosen_scored, row.pair.rejected_scored])
    spelled_out = dataclasses.replace(row, pair=dataclasses.replace(row.pair, scored_mask=mask))
    assert write(folder, [row]) == write(folder, [spelled_out])


def test_the_footer_describes_the_shard(folder: Path) -> None:
    path = write(folder, make_rows(3), recorded={"torch": "2.13"})
    metadata = pq.ParquetFile(path).metadata.metadata
    assert metadata == {
        b"dpo_cache.format_version": b"1",
        b"dpo_cache.reference_id": b"f" * 64,
        b"dpo_cache.key_version": b"1",
        b"dpo_cache.scoring_version": b"1",
        b"dpo_cache.recorded": b'{"torch":"2.13"}',
    }
    with ShardReader(path) as shard:
        assert shard.recorded == {"torch": "2.13"}
        assert shard.reference_id == "f" * 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_common_logps")
        for value in (float("nan"), float("inf"), float("-inf"), 0.5)
        if (name, str(value)) != ("ref_chosen_common_logps", "nan")  # that one is merely not known
    ],
)
def test_a_value_no_reference_can_give_is_never_written(folder: Path, name: str, value: float) -> None:
    rows = make_rows(5)
    changes: dict[str, Any] = {name: value}
    bad = dataclasses.replace(rows[3], **changes)
    assert not is_possible(bad)
    assert is_possible(rows[3])
    with pytest.raises(DpoCacheError, match=f"1 pairs have no finite log-probability below zero: {bad.key.hex()}"):
        write(folder, [*rows[:3], bad])
    assert list(folder.iterdir()) == []


def test_a_sum_of_exactly_zero_is_refused_in_words_of_its_own_with_key_and_values(folder: Path) -> None:
    rows = make_rows(4)
    sure = dataclasses.replace(rows[0], ref_chosen_logps=0.0, ref_rejected_logps=-2.5)
    broken = dataclasses.replace(rows[1], ref_rejected_logps=float("nan"))
    with pytest.raises(DpoCacheError) as caught:
        write(folder, [sure, broken, *rows[2:]])
    zero, nan = (next(part for part in caught.value.found.split("; ") if word in part) for word in ("0.0", "finite"))
    assert zero.startswith(
        "1 pairs have a log-probability of exactly 0.0, that is probability 1 for every scored token"
    )
    assert zero.endswith(f"{sure.key.hex()} (chosen 0, rejected -2.5)")
    assert f"{broken.key.hex()} (chosen " in nan


def test_a_sum_of_zero_is_a_missing_value_but_a_common_part_may_be_certain() -> None:
    row = make_rows(1)[0]
    assert not is_possible(dataclasses.replace(row, ref_chosen_logps=0.0))
    assert is_possible(dataclasses.replace(row, ref_chosen_common_logps=0.0))


def test_a_common_part_that_nobody_knows_comes_back_as_such(folder: Path) -> None:
    row = dataclasses.replace(make_rows(1)[0], ref_chosen_common_logps=float("nan"))
    (read,) = read_shard(write(folder, [row]))
    assert np.isnan(read.ref_chosen_common_logps)
    assert read.ref_rejected_common_logps == row.ref_rejected_common_logps


def test_every_flipped_bit_and_every_truncation_is_found(folder: Path) -> None:
    path = write(folder, make_rows(2))
    whole = path.read_bytes()
    random = np.random.RandomState(0)
    for place in random.choice(len(whole) * 8, size=400, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DpoCacheError, match="is damaged"):
            verify_shard(path)
    for length in random.choice(len(whole), size=50, replace=False):
        path.write_bytes(whole[:length])
        with pytest.raises(DpoCacheError, match="is damaged"):
            verify_shard(path)


def forge(folder: Path, content: bytes) -> Path:
    """A file whose name is the digest of its bytes, as a stranger would make it."""
    path = folder / f"{hashlib.sha256(content).hexdigest()}.parquet"
    path.write_bytes(content)
    verify_shard(path)
    return path


@once_a_function
@given(data=st.data())
def test_a_forged_shard_ends_in_our_error_or_in_rows_that_match_their_keys(folder: Path, data: st.DataObject) -> None:
    content = bytearray(write(folder, make_rows(12)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of what can go wrong is in the footer, at the end.
        start = data.draw(st.sampled_from([0, len(content) - 2500]))
        content[data.draw(st.integers(start, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = forge(folder, bytes(content))
    try:
        rows = list(checked_rows(path))
    except DpoCacheError as error:
        refusal = str(error)
        assert path.name in refusal
    else:
        assert all(example_key(row.pair) == row.key for row in rows)


def forged_row(folder: Path, **changes: Any) -> Path:
    """A shard with one row that contradicts itself, written by our own writer with its checks off."""
    pair = changes.pop("pair", None) or make_pair(np.random.RandomState(1))
    row = make_row(pair, np.random.RandomState(2), **changes)
    return write(folder, [row])


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


def test_rows_that_contradict_themselves_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "refuse_unusable_values", lambda rows: None)
    pair = TokenPair(prompt_ids=ids(1, 2), chosen_ids=ids(3, 4), rejected_ids=ids(5))
    tokens: dict[str, Any] = {
        "chosen_token_logps": np.full(2, -1, np.float32),
        "rejected_token_logps": np.full(1, -1, np.float32),
        **{"ref_chosen_logps": -2.0, "ref_rejected_logps": -1.0},
        **{"ref_chosen_common_logps": -1.0, "ref_rejected_common_logps": -1.0},
    }
    first_token_scored = dataclasses.replace(pair, scored_mask=np.array([True, False, True, True, True]))
    wrong: dict[str, dict[str, Any]] = {
        "a token id is negative": {"pair": dataclasses.replace(pair, chosen_ids=ids(3, -4))},
        "has no tokens": {"pair": dataclasses.replace(pair, prompt_ids=ids())},
        "contradict its mask": {"pair": pair, "chosen_tokens": 1},
        "scored counts of": {"pair": first_token_scored},
        "no finite log-probability below zero": {"pair": pair, "ref_chosen_logps": float("nan")},
        "as many values per token": {"pair": pair, **tokens, "chosen_token_logps": np.full(3, -1, np.float32)},
        "do not add up to ref_chosen_logps": {"pair": pair, **tokens, "ref_chosen_logps": -2.1},
        "do not add up to ref_rejected_common_logps": {"pair": pair, **tokens, "ref_rejected_common_logps": -0.9},
        "add up to ref_rejected_logps": {
            "pair": pair,
            **tokens,
            "rejected_token_logps": np.full(1, np.nan, np.float32),
        },
        "against what the footer says": {"pair": pair, "chosen_token_logps": np.full(2, -1, np.float32)},
        "is not that of its token ids": {"pair": pair, "key": b"k" * 32},
    }
    for message, changes in wrong.items():
        with pytest.raises(DpoCacheError, match=message):
            list(checked_rows(forged_row(folder, **changes)))


def test_values_per_token_that_the_footer_keeps_quiet_about_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "TOKEN_LOGPS_KEY", "dpo_cache.something_else")
    with pytest.raises(DpoCacheError, match="against what the footer says"):
        read_shard(write(folder, make_rows(3, token_logps=True)))


def test_a_shard_has_values_per_token_for_all_of_its_rows_or_for_none(folder: Path) -> None:
    with pytest.raises(AssertionError, match="or none"):
        write(folder, [*make_rows(1), *make_rows(1, seed=1, token_logps=True)])


def test_what_is_not_a_shard_is_refused_by_name(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(DpoCacheError, match="its name is not a SHA-256"):
        verify_shard(folder / "notes.txt")
    missing = folder / ShardRef(sha256="0" * 64, num_rows=1, num_bytes=1).file_name
    for read in (verify_shard, ShardReader, partial(read_shard_rows, rows=[0])):
        with pytest.raises(DpoCacheError, match=f"{missing.name} is missing"):
            read(missing)


def test_another_format_version_is_refused_before_anything_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "FORMAT_VERSION", 2)
    path = write(folder, make_rows(1))
    monkeypatch.undo()
    with pytest.raises(DpoCacheError, match="has format version 2"):
        ShardReader(path)


def test_many_pairs_of_all_lengths_share_a_shard(folder: Path) -> None:
    random = np.random.RandomState(3)
    long = make_row(
        TokenPair(
            prompt_ids=random.randint(0, 9, 50_000).astype(np.int32), chosen_ids=ids(1), rejected_ids=ids(2, 2**31 - 1)
        ),
        random,
    )
    rows = [*make_rows(300), long, *make_rows(5, seed=9)]
    assert [fields_of(row) for row in checked_rows(write(folder, rows))] == [fields_of(row) for row in rows]

"""Work units: alike in cost, bounded even where one prompt has all the pairs, and never a shard that nobody reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_factory import make_row
from dpo_cache.pipeline.cache import shard_writer
from dpo_cache.pipeline.cache.shard_file import ShardReader
from dpo_cache.pipeline.cache.shard_writer import MAX_ROW_GROUPS, write_shard
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.stages.building import build_plan
from dpo_cache.stages.building.build_plan import MAX_UNIT_TOKENS, MIN_UNIT_TOKENS, cut_units
from dpo_cache.stages.building.pair_collection import SpooledPairs


def waiting(prompts: list[int], lengths: list[int]) -> SpooledPairs:
    count = len(prompts)
    return SpooledPairs(
        spool_indices=np.arange(count),
        keys=np.array([number.to_bytes(32, "big") for number in range(1, count + 1)], dtype="S32"),
        prompt_hashes=np.array(prompts, dtype=np.uint64),
        lengths=np.array(lengths, dtype=np.int64),
    )


def tokens_of_units(pairs: SpooledPairs, **options: int) -> list[int]:
    order, units = cut_units(pairs, num_workers=options.get("num_workers", 1))
    assert sorted(order.tolist()) == list(range(len(pairs)))
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == len(pairs)
    return [int(pairs.lengths[order[unit.start : unit.stop]].sum()) for unit in units]


def test_pairs_of_a_prompt_stay_together_unless_they_are_too_many_for_any_unit() -> None:
    pairs = waiting([7] * 300 + [9] * 20, [1000] * 320)
    order, units = cut_units(pairs, num_workers=1)
    prompts = [set(pairs.prompt_hashes[order[unit.start : unit.stop]].tolist()) for unit in units]
    assert sum(7 in unit for unit in prompts) > 1, "300,000 tokens of one prompt are more than two units"
    assert sum(9 in unit for unit in prompts) == 1
    assert max(tokens_of_units(pairs)) < 2 * max(MIN_UNIT_TOKENS, 320_000 // 16) + 1000


def test_a_job_of_a_single_prompt_is_shared_out_and_no_unit_outgrows_its_bound() -> None:
    pairs = waiting([1] * 4_000, [30_000] * 4_000)
    tokens = tokens_of_units(pairs)
    assert max(tokens) < 2 * MAX_UNIT_TOKENS + 30_000
    assert len(tokens) >= 50


def test_no_unit_can_have_more_row_groups_than_a_shard_may_have() -> None:
    """Two neighbouring row groups hold more than the bound on ids or a full one's pairs."""
    by_ids = 2 * (2 * MAX_UNIT_TOKENS) // shard_writer.MAX_ROW_GROUP_IDS + 1
    by_pairs = build_plan.MAX_UNIT_PAIRS // shard_writer.MAX_ROW_GROUP_PAIRS
    assert by_ids + by_pairs <= MAX_ROW_GROUPS


def test_very_short_pairs_are_bounded_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "MAX_UNIT_PAIRS", 100)
    assert tokens_of_units(waiting([1] * 250, [3] * 250)) == [300, 300, 150]


def test_the_largest_footer_of_a_shard_that_compresses_to_nothing_can_be_read(tmp_path: Path) -> None:
    """A long prompt stands in every row, so a row group takes less room than its entry in the footer."""
    prompt, random = np.full(16_400, 7, dtype=np.int32), np.random.RandomState(0)
    rows = [
        make_row(
            TokenPair(prompt_ids=prompt, chosen_ids=np.array([number, 1], np.int32), rejected_ids=prompt[:1]), random
        )
        for number in range(MAX_ROW_GROUPS)
    ]
    folder = tmp_path
    shard = write_shard(folder, rows, reference_id="f" * 64, scoring_version=1, recorded={}, temporary_folder=folder)
    content = (folder / shard.file_name).read_bytes()
    assert int.from_bytes(content[-8:-4], "little") > (1 << 16) + len(content) // 4
    with ShardReader(folder / shard.file_name) as reader:
        assert (reader.num_rows, len(reader.group_starts)) == (len(rows), len(rows))
        assert reader.read_row_group(len(rows) - 1).scored_pair(0).key == rows[-1].key


def test_more_row_groups_than_a_reader_takes_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MAX_ROW_GROUP_PAIRS", 1)
    monkeypatch.setattr(shard_writer, "MAX_ROW_GROUPS", 2)
    one, other = np.ones(1, np.int32), np.zeros(1, np.int32)
    pair = TokenPair(prompt_ids=one, chosen_ids=one, rejected_ids=other)
    row = make_row(pair, np.random.RandomState(0))
    with pytest.raises(AssertionError, match="cut into units first"):
        write_shard(tmp_path, [row] * 3, reference_id="f", scoring_version=1, recorded={}, temporary_folder=tmp_path)

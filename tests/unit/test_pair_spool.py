"""Pairs that wait to be scored, on a disk that may be full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.pair_spool import ROWS_PER_BATCH, PairSpoolWriter
from dpo_cache.pipeline.data.token_pair import TokenPair


def spool_on_full_disk(num_pairs: int, *, then: Exception | None = None) -> None:
    ids = np.arange(100, dtype=np.int32)
    with PairSpoolWriter(Path("/dev/full")) as writer:
        for _ in range(num_pairs):
            writer.append(TokenPair(prompt_ids=ids, chosen_ids=ids, rejected_ids=ids[:-1]))
        if then is not None:
            raise then


@pytest.mark.parametrize("num_pairs", [1, ROWS_PER_BATCH, ROWS_PER_BATCH + 1])
def test_what_cannot_be_written_is_named(num_pairs: int) -> None:
    with pytest.raises(DpoCacheError, match=r"cannot write /dev/full: .*No space left on device") as full:
        spool_on_full_disk(num_pairs)
    assert "df -h" in str(full.value.next_step)


def test_a_full_disk_does_not_hide_the_fault_that_came_first() -> None:
    with pytest.raises(DpoCacheError, match="more unusable rows"):
        spool_on_full_disk(1, then=DpoCacheError("more unusable rows"))

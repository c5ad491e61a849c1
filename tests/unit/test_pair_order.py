"""Every pair once an epoch, in an order that only mixture, seed and epoch decide."""

from __future__ import annotations

import hashlib

import numpy as np
from dpo_cache.pipeline.cache.pair_order import epoch_order
from hypothesis import given
from hypothesis import strategies as st

DIGEST = "ab" * 32
GOLDEN_START = [2120, 48, 742, 1252, 732, 4383, 766, 1319]
GOLDEN_DIGEST = "42b9a8c1c48f567f7b24eebe8194ee12638ae4522e139784d8ecf6a7849e6e2d"


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
def test_every_row_stands_exactly_once(
    num_pairs: int, block_rows: int, window_blocks: int, seed: int, epoch: int
) -> None:
    order = epoch_order(
        num_pairs=num_pairs,
        block_rows=block_rows,
        window_blocks=window_blocks,
        seed=seed,
        epoch=epoch,
        mixture_digest=DIGEST,
    )
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(num_pairs))


def test_seed_epoch_and_mixture_each_change_the_order_and_nothing_else_does() -> None:
    def order(seed: int = 0, epoch: int = 0, digest: str = DIGEST) -> tuple[int, ...]:
        return tuple(epoch_order(num_pairs=500, block_rows=8, seed=seed, epoch=epoch, mixture_digest=digest).tolist())

    np.random.seed(1)
    first = order()
    np.random.rand(10)
    assert order() == first
    assert len({first, order(seed=1), order(epoch=1), order(digest="cd" * 32), order(seed=1, epoch=1)}) == 5


def test_golden_order() -> None:
    """The order is part of what a resumed run relies on: it may not change with a version of numpy."""
    order = epoch_order(num_pairs=5000, block_rows=64, seed=42, epoch=3, mixture_digest=DIGEST, window_blocks=8)
    assert order[:8].tolist() == GOLDEN_START
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == GOLDEN_DIGEST


def test_a_window_holds_the_rows_of_its_blocks_and_no_others() -> None:
    order = epoch_order(num_pairs=6400, block_rows=16, window_blocks=10, seed=0, epoch=0, mixture_digest=DIGEST)
    for start in range(0, 6400, 160):
        assert len(set((order[start : start + 160] // 16).tolist())) == 10


def test_position_tells_nothing_about_the_row_even_where_the_window_is_small() -> None:
    """Rank correlation of position and row: its standard deviation is 1 / sqrt(B - 1) for B permuted blocks."""
    num_pairs, block_rows = 100_000, 16
    for epoch in range(3):
        order = epoch_order(
            num_pairs=num_pairs, block_rows=block_rows, window_blocks=16, seed=0, epoch=epoch, mixture_digest=DIGEST
        )
        correlation = np.corrcoef(np.arange(num_pairs), order)[0, 1]
        assert abs(correlation) < 4 / np.sqrt(num_pairs / block_rows)
        # And within a window neighbours are as far apart as chance puts them: rarely in one block.
        neighbours = (order[1:] // block_rows == order[:-1] // block_rows).mean()
        assert abs(neighbours - 1 / 16) < 0.01


def test_a_set_smaller_than_a_window_is_shuffled_whole() -> None:
    """Each row is in each place about equally often: chi-square over 2,000 seeds, 81 degrees of freedom."""
    counts = np.zeros((10, 10))
    for seed in range(2000):
        order = epoch_order(num_pairs=10, block_rows=4, seed=seed, epoch=0, mixture_digest=DIGEST)
        counts[np.arange(10), order] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 40 < chi_square < 140

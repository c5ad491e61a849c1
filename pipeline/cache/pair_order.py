"""The order in which an epoch visits a mixture: a pure function, the same on any number of ranks or workers."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

WINDOW_BLOCKS = 16
"""Blocks shuffled together: 16,384 pairs at the usual 1,024 a block, which a reader keeps at hand."""


def epoch_order(
    *,
    num_pairs: int,
    block_rows: int,
    seed: int,
    epoch: int,
    mixture_digest: str,
    window_blocks: int = WINDOW_BLOCKS,
) -> npt.NDArray[np.int32]:
    """The mixture rows of one epoch in the order of training, each exactly once.

    Blocks of consecutive rows are permuted, then rows are shuffled within windows of many blocks: as good as a
    full shuffle where it matters (the mixture itself is in the order of a hash), yet a reader that goes along
    touches only one window's blocks at a time.

    Args:
        num_pairs: Rows of the mixture.
        block_rows: Rows of a block; the last block may have fewer.
        seed: The run's seed.
        epoch: From 0.
        mixture_digest: :attr:`~.mixture.Mixture.digest`.
        window_blocks: Blocks of a window.

    Returns:
        Row numbers, shape (num_pairs,): 32 bits each, because a run keeps an epoch of them.
    """
    assert min(num_pairs, block_rows, window_blocks) > 0
    random = _random_state(mixture_digest, seed, epoch)
    blocks = random.permutation(-(-num_pairs // block_rows))
    order = np.empty(num_pairs, dtype=np.int32)
    filled = 0
    for start in range(0, len(blocks), window_blocks):
        rows = blocks[start : start + window_blocks, None] * block_rows + np.arange(block_rows)
        rows = rows[rows < num_pairs]
        order[filled : filled + len(rows)] = rows[random.permutation(len(rows))]
        filled += len(rows)
    return order


def _random_state(mixture_digest: str, seed: int, epoch: int) -> np.random.RandomState:
    """numpy's legacy generator: its stream is frozen for good (NEP 19), a Generator's may change."""
    text = f"dpo-cache order 1|{mixture_digest}|{seed}|{epoch}"
    return np.random.RandomState(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype="<u4"))

"""Memory of the host that is freed and should really be free.

glibc gives a large block pages of its own and returns them when it is freed; smaller ones share a heap. Where the line
runs it decides by itself: it climbs to the size of whatever large block was freed last, up to 32 MiB. Gradients of an
embedding then lie on the heap among activations, whose sizes change with every micro-batch, and leave holes that
nothing fits into: a run that needs 1.7 GB takes 2.4 after ten updates, and more with each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRAINING_BLOCK = 16 * 2**20
"""What has pages of its own while a model is trained: below lie activations, quicker from a heap, and chunks of logits.
"""
LOADING_BLOCK = 2**20
KEPT_FREE = 256 * 2**20
"""Free memory at the end of the heap that is kept for the next micro-batch."""


def set_large_blocks_apart() -> None:
    """Fix the line, for the rest of this process. Without glibc nothing happens."""
    _set_limits(large_block=TRAINING_BLOCK, kept_free=KEPT_FREE)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """While this is open, freed blocks of a MiB and more go back to the system at once.

    Loading a model in parts makes a whole weight and a part of it in turns. A heap would keep the holes that the whole
    ones leave: with eight ranks on a node, eight times most of the model.
    """
    _set_limits(large_block=LOADING_BLOCK, kept_free=LOADING_BLOCK)
    try:
        yield
    finally:
        set_large_blocks_apart()


def _set_limits(*, large_block: int, kept_free: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, large_block)
        libc.mallopt(M_TRIM_THRESHOLD, kept_free)
        libc.malloc_trim(0)

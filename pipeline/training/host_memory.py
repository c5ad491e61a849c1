"""glibc's thresholds, set so that memory that is freed goes back to the system.

glibc gives a large block pages of its own and returns them when the block is freed; smaller blocks share a heap. It
moves the size that counts as large, its mmap threshold, by itself: up to that of the largest block freed so far, at
most 32 MiB. Gradients of an embedding then lie on the heap among activations, whose sizes change with every
micro-batch, and fragment it: a run that needs 1.7 GB takes 2.4 after ten updates, and more with each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
MMAP_BYTES_TRAINING = 16 * 2**20
"""Above activations, which are quicker on the heap, and chunks of logits."""
TRIM_BYTES_TRAINING = 256 * 2**20
"""Free memory at the end of the heap that is kept for the next micro-batch."""
BYTES_LOADING = 2**20


def fix_mmap_threshold() -> None:
    """Set the thresholds for training, for the rest of this process. Without glibc nothing happens."""
    _set_thresholds(mmap_bytes=MMAP_BYTES_TRAINING, trim_bytes=TRIM_BYTES_TRAINING)


@contextmanager
def low_mmap_threshold() -> Iterator[None]:
    """While this is open, freed blocks of a MiB or more go back to the system at once; then as for training.

    Loading a partitioned model allocates a whole weight and a part of it in turn. A heap would keep the holes that the
    whole weights leave: with eight ranks on a node, eight times most of the model.
    """
    _set_thresholds(mmap_bytes=BYTES_LOADING, trim_bytes=BYTES_LOADING)
    try:
        yield
    finally:
        fix_mmap_threshold()


def return_freed_memory() -> None:
    """Give back what lies free on the heap, between blocks in use too. Without glibc nothing happens.

    A large block gets pages of its own only where no hole of the heap has room for it, and a hole that was filled and
    freed again keeps its pages.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _set_thresholds(*, mmap_bytes: int, trim_bytes: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, mmap_bytes)
        libc.mallopt(M_TRIM_THRESHOLD, trim_bytes)
        libc.malloc_trim(0)

"""Memory of the host that is freed and should really be free."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3
LOADING_THRESHOLD = 2**20
USUAL_THRESHOLD = 32 * 2**20
"""Where glibc's own adjustment ends up once large blocks have been freed."""


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """While this is open, freed blocks of a MiB and more go back to the system at once.

    Loading a model in parts makes a whole weight and a part of it in turns. glibc would keep the holes that the whole
    ones leave: with eight ranks on a node, eight times most of the model. Afterwards large blocks are kept for the
    next use again, as the steps of a training are quicker that way.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # a system without glibc
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, LOADING_THRESHOLD)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, USUAL_THRESHOLD)

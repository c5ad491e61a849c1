"""A number of bytes, as people write it."""

from __future__ import annotations


def byte_size(num_bytes: int) -> str:
    """``12.0 KiB``, ``3.4 MiB``, ``204.8 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1024:,.1f} KiB"

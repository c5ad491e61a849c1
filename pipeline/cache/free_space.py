"""How much room a disk has, where it says so."""

from __future__ import annotations

import math
import shutil
from pathlib import Path


def free_bytes(folder: Path) -> float:
    """Bytes that can still be written there; infinite on a file system that gives no numbers, as some of FUSE do."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf

"""Blocks that are freed, seen from outside the process: what the kernel still counts as its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from dpo_cache.pipeline.training.host_memory import {limits}

def resident_mib():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def block(mib):
    address = libc.malloc(mib * 2**20)
    ctypes.memset(address, 1, mib * 2**20)
    return address

libc.free(block(30))  # from here on glibc itself would keep blocks of up to 30 MiB on the heap
with {limits}() if "low" in "{limits}" else __import__("contextlib").nullcontext({limits}()):
    before = resident_mib()
    for _ in range(20):
        large, small = block({mib}), block(1)
        libc.free(large)  # the small one stays behind it
    print(resident_mib() - before)
"""


@pytest.mark.parametrize(("limits", "mib"), [("fix_mmap_threshold", 17), ("low_mmap_threshold", 2)])
def test_freed_blocks_leave_no_holes(limits: str, mib: int) -> None:
    script = SCRIPT.format(limits=limits, mib=mib)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20 + mib + 5


HOLES = """
from dpo_cache.pipeline.training.host_memory import return_freed_memory
{common}
kept = []
blocks = []
for _ in range(40):
    blocks.append(block(1))
    kept.append(block(1))
for address in blocks:
    libc.free(address)
before = resident_mib()
return_freed_memory()
print(before - resident_mib())
"""


def test_memory_that_was_freed_between_blocks_in_use_is_given_back() -> None:
    common = SCRIPT[SCRIPT.index("def resident_mib") : SCRIPT.index("libc.free(block(30))")]
    on_heap = "import ctypes\nctypes.CDLL(None).mallopt(-3, 2**25)  # no block of these gets pages of its own\n"
    script = HOLES.format(common=on_heap + common)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 30

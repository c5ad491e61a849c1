"""Processors, memory, disks and limits of the machine."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .finding import Finding, Level

_found = partial(Finding, "machine")
GIB = 2**30
DISK_TOO_SMALL, DISK_SMALL = 1 * GIB, 50 * GIB
"""A start writes a cache, logs and scratch files; a 7B model with optimizer state takes 112 GB a checkpoint."""
MEMORY_SMALL = 4 * GIB
SHARED_MEMORY_SMALL = 1 * GIB
"""NCCL takes it for ranks of one machine; a container has 64 MiB unless it is told otherwise."""
OPEN_FILES_SMALL = 4096
"""Shards of a cache and of a model, sockets between ranks: some thousands in large jobs."""
SHARED_MEMORY = Path("/dev/shm")
MEMORY_INFO = Path("/proc/meminfo")


def examine_machine(folder: Path) -> Iterator[Finding]:
    """What the machine gives this process.

    Args:
        folder: Where caches and runs would be written.
    """
    yield _threads()
    yield _memory()
    yield from _disks(folder)
    yield _shared_memory()
    yield _open_files()


def _threads() -> Finding:
    usable = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    value = f"{usable} of {os.cpu_count()} usable" if usable != os.cpu_count() else f"{usable}"
    if threads and threads.isdigit() and int(threads) > usable:
        return _found(
            "CPU threads",
            f"{value}; OMP_NUM_THREADS={threads} asks for more",
            Level.WARNING,
            "unset OMP_NUM_THREADS: each process then gets its share of the processors",
        )
    return _found("CPU threads", value)


def _memory() -> Finding:
    sizes = dict(line.split(":") for line in MEMORY_INFO.read_text(encoding="ascii").splitlines())
    available, total = (int(sizes[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    value = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < MEMORY_SMALL:
        return _found("memory", value, Level.WARNING, "end other programs, or use a machine with more memory")
    return _found("memory", value)


def _disks(folder: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {
        "this folder": (folder, "put --cache and --output on a larger disk"),
        "models, datasets": (Path(HF_HUB_CACHE), "set HF_HOME to a folder on a larger disk"),
        "scratch files": (Path(tempfile.gettempdir()), "set TMPDIR to a folder on a larger disk"),
    }
    for name, (place, advice) in places.items():
        yield _disk(name, place.absolute(), advice)


def _disk(name: str, place: Path, advice: str) -> Finding:
    # Not Path.exists: it raises for a folder in a home that this user may not look into.
    existing = next(parent for parent in (place, *place.parents) if os.path.exists(parent))
    usage = shutil.disk_usage(existing)
    value = f"{usage.free / GIB:.1f} GiB free in {place}"
    if not os.access(existing, os.W_OK):
        return _found(name, f"{existing} cannot be written to", Level.FATAL, advice)
    if not usage.total:
        return _found(name, f"{place}, on a file system that does not say how much is free")
    if usage.free < DISK_TOO_SMALL:
        return _found(name, value, Level.FATAL, advice)
    if usage.free < DISK_SMALL and name != "scratch files":
        return _found(name, value, Level.WARNING, f"enough for small models; {advice}")
    return _found(name, value)


def _shared_memory() -> Finding:
    import torch

    size = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0
    value = f"{size / GIB:.2f} GiB free"
    if size >= SHARED_MEMORY_SMALL:
        return _found("/dev/shm", value)
    advice = "in a container: docker run --shm-size=16g, or --ipc=host; else: mount -o remount,size=16G /dev/shm"
    matters = torch.cuda.device_count() > 1
    return _found("/dev/shm", value, Level.WARNING if matters else Level.NOTE, advice if matters else None)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES_SMALL:
        reachable = hard if 0 <= hard < OPEN_FILES_SMALL else OPEN_FILES_SMALL
        advice = f"ulimit -n {reachable}" if reachable > soft else "ask for a higher hard limit (limits.conf)"
        return _found("open files", f"at most {soft}", Level.WARNING, advice)
    return _found("open files", "unlimited" if soft < 0 else f"at most {soft}")

"""The folder of a run: refused where it would be overwritten, locked while it is written."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import DpoCacheError
from ...pipeline.cache.durable_file import unfinished_writes
from .run_config import FILE as CONFIG
from .run_config import has_run_config

LOCK = ".lock"
TRIAL_MODEL = "model.dry-run"
"""What a dry run saves to measure it, and removes again."""
BEFORE_FIRST_STEP = {LOCK, "step0.json", "dry-run.json"}
"""What a run that failed before its first update leaves, besides its config: nothing to lose, nothing to resume."""

SEEN_WITHIN_S = 30.0
"""A shared file system may show another machine's file late."""
POLL_S = 0.2


def refuse_overwriting(output: Path) -> None:
    """Refuse a folder that holds anything a fresh run could harm.

    Raises:
        DpoCacheError: The folder is not empty, or another process trains into it.
    """
    held = held_by(output)
    if not held:
        return
    if (output / LOCK).exists():  # a run that is still training cannot be resumed
        with output_lock(output):
            pass
    raise DpoCacheError(
        f"--output {output} is not empty: it holds {_some_of(held)}",
        expected="an empty folder, one that does not exist yet, or a run to resume",
        next_step="add --resume to continue that run, or give another --output",
    )


def refuse_other_folder(output: Path) -> None:
    """Refuse a folder that holds anything but a run.

    Raises:
        DpoCacheError: The folder is not empty, and no run wrote what it holds.
    """
    held = held_by(output)
    if held and not has_run_config(output):
        raise DpoCacheError(
            f"--output {output} is not the folder of a run: it holds {_some_of(held)}, and no {CONFIG} of a run",
            expected="an empty folder, one that does not exist yet, or a run to resume",
            next_step="give another --output",
        )


def held_by(output: Path) -> list[str]:
    """What a folder holds that a fresh run could harm; empty where there is no such folder.

    Raises:
        DpoCacheError: It is a file.
    """
    if not output.exists():
        return []
    if not output.is_dir():
        raise DpoCacheError(f"--output {output} is a file", expected="a folder, or a name that is free")
    harmless = BEFORE_FIRST_STEP | {path.name for path in _leftovers(output)}
    if has_run_config(output):
        harmless.add(CONFIG)
    return sorted(set(os.listdir(output)) - harmless)


@contextmanager
def output_lock(output: Path) -> Iterator[str]:
    """Held while a run or a sweep writes its folder; what a killed one left half-written is removed.

    Yields:
        The process that holds it, as the lock names it.

    Raises:
        DpoCacheError: Another process trains into this folder, or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / LOCK, "a+", encoding="utf-8", opener=_open_without_links)  # noqa: SIM115
    except OSError as refused:
        raise DpoCacheError(f"--output {output} cannot be written: {refused.strerror}") from refused
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as taken:
            lock.seek(0)
            raise DpoCacheError(
                f"--output {output} is in use by process {lock.read().strip() or 'unknown'}",
                next_step="wait for that run to end, or give another --output",
            ) from taken
        except OSError as unsupported:  # such as Lustre without its mount option flock
            raise DpoCacheError(
                f"--output {output} cannot be locked: {unsupported.strerror}",
                next_step="give an --output on a file system with file locks",
            ) from unsupported
        holder = f"{os.getpid()} on {socket.gethostname()}"
        lock.truncate(0)
        lock.write(holder)
        lock.flush()
        os.fsync(lock.fileno())  # other machines look for it
        _remove_leftovers(output)
        yield holder


def refuse_unshared(output: Path, holder: str) -> None:
    """Refuse a folder that is not the one that rank 0 has locked.

    Every rank writes its part of a checkpoint there, and rank 0 would mark one complete that lacks the others' parts.

    Args:
        output: The run's folder, as this rank sees it.
        holder: From rank 0's :func:`output_lock`.

    Raises:
        DpoCacheError: This machine has another folder of that name, or none.
    """
    deadline = time.monotonic() + SEEN_WITHIN_S
    while _holder(output) != holder:
        if time.monotonic() > deadline:
            raise DpoCacheError(
                f"--output {output} is not the folder that rank 0 sees under that name",
                expected="one folder that all ranks share, for each writes its part of a checkpoint",
                next_step="give the absolute path of a folder on a file system that all machines share",
            )
        time.sleep(POLL_S)


def _open_without_links(path: str, flags: int) -> int:
    """A folder that others may write to, or that came from elsewhere, could hold a link to a file we would empty."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _holder(output: Path) -> str | None:
    try:
        return (output / LOCK).read_text(encoding="utf-8")
    except OSError:
        return None


def _some_of(names: list[str]) -> str:
    return ", ".join(names[:5])


def _leftovers(output: Path) -> list[Path]:
    """What a kill in the middle of a write leaves: half a file, or a dry run's model, as large as the policy."""
    return [output / TRIAL_MODEL, output / f"{TRIAL_MODEL}.tmp", *unfinished_writes(output)]


def _remove_leftovers(output: Path) -> None:
    for path in _leftovers(output):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

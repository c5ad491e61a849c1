"""Advisory locks on a cache folder, held by open files: whoever dies lets go.

Builders share ``tmp/cache.lock`` and hold ``tmp/mixture-<name>.lock`` alone. What reads for hours (a training, an
upload, a verification) shares ``tmp/cache.lock`` and ``tmp/training.lock``. What deletes (gc, repair, compact) holds
``tmp/cache.lock`` alone. Lock files are never deleted, or two processes could hold two files of one name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ...errors import DpoCacheError, as_argument

CACHE_LOCK = "cache.lock"
CREATION_LOCK = "create.lock"
FETCHING_LOCK = "fetch.lock"
TRAINING_LOCK = "training.lock"
_MAX_HOLDER_BYTES = 1024
_IN_USE = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def building_lock(temporary_folder: Path, mixture_name: str) -> Iterator[None]:
    """Held while a mixture is built: others may build other mixtures, nobody may delete.

    Raises:
        DpoCacheError: Another process builds this mixture or deletes in this cache; the message names it.
    """
    with (
        _locked(temporary_folder / CACHE_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB, work="a build"),
        _locked(
            temporary_folder / _mixture_lock(mixture_name),
            fcntl.LOCK_EX | fcntl.LOCK_NB,
            work=f"a build of mixture {mixture_name}",
        ),
    ):
        yield


@contextmanager
def maintenance_lock(temporary_folder: Path, work: str) -> Iterator[None]:
    """Held while files are removed (``work`` says by what): nobody builds meanwhile.

    Raises:
        DpoCacheError: A build or another maintenance is running; the message names it.
    """
    with _locked(temporary_folder / CACHE_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB, work=work):
        yield


@contextmanager
def reading_lock(temporary_folder: Path, work: str) -> Iterator[None]:
    """Held by what reads for hours (``work`` says what): others may read and build, nobody may delete.

    Reading needs no lock. Where none can be had (a read-only folder without lock files, a file system that knows no
    locks), none is held.

    Raises:
        DpoCacheError: Something deletes in this cache; the message names it.
    """
    with ExitStack() as held:
        for name in (CACHE_LOCK, TRAINING_LOCK):
            try:
                file = _open(temporary_folder / name)
            except OSError:
                continue
            held.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if name == CACHE_LOCK and error.errno in _IN_USE:
                    raise _refused(temporary_folder / name, error, work) from error
            else:
                if name == TRAINING_LOCK:
                    _describe(file, work)
        yield


@contextmanager
def fetching_lock(temporary_folder: Path) -> Iterator[None]:
    """Held while shards are fetched from elsewhere: nobody deletes, and others who fetch wait.

    Raises:
        DpoCacheError: Another process deletes in this cache; the message names it.
    """
    with (
        _locked(temporary_folder / FETCHING_LOCK, fcntl.LOCK_EX, work="fetching"),
        _locked(temporary_folder / CACHE_LOCK, fcntl.LOCK_SH | fcntl.LOCK_NB, work="fetching"),
    ):
        yield


@contextmanager
def creation_lock(temporary_folder: Path) -> Iterator[None]:
    """Held for the moment in which ``cache.json`` is written; others wait."""
    with _locked(temporary_folder / CREATION_LOCK, fcntl.LOCK_EX, work="creating the cache"):
        yield


@contextmanager
def _locked(path: Path, mode: int, *, work: str) -> Iterator[None]:
    try:
        file = _open(path)
    except OSError as error:
        raise _may_not_lock(path, error) from error
    try:
        try:
            fcntl.flock(file, mode)
        except OSError as error:
            raise _refused(path, error, work) from error
        if mode & fcntl.LOCK_EX:
            _describe(file, work)
        yield
    finally:
        os.close(file)


def _open(path: Path, *, create: int = os.O_CREAT) -> int:
    """A lock file. A lock needs no right to write, which the umask of the user who made the file may have kept from us.

    Without it the file goes on naming an earlier holder. NFS alone asks for it, where the lock is not to be shared.
    A pipe in its place, as a cache from elsewhere may hold, is not waited for.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | create | flags, 0o666)
    except OSError:
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | flags)
        raise


def _describe(file: int, work: str) -> None:
    """Say in a lock file who holds it."""
    with suppress(OSError):  # a full disk: who holds it is a courtesy, the lock holds without
        os.ftruncate(file, 0)
        os.pwrite(file, _description(work).encode(), 0)


def _refused(path: Path, error: OSError, work: str) -> DpoCacheError:
    if error.errno == errno.EBADF:  # NFS, of a file that is open to be read only
        return _may_not_lock(path, error)
    if error.errno not in _IN_USE:
        return DpoCacheError(
            f"cannot lock {path}: {error.strerror}",
            next_step="put the cache on a file system with file locks",
        )
    return DpoCacheError(
        f"{work} cannot start: {path.parent.parent} is in use by {'; '.join(_holders(path))}",
        next_step="wait for it to end, or stop it",
    )


def _may_not_lock(path: Path, error: OSError) -> DpoCacheError:
    is_another_users = error.errno in (errno.EACCES, errno.EPERM, errno.EBADF)
    remedy = f"whoever made it can let a group write there: chmod -R g+rwX {as_argument(path.parent.parent)}"
    return DpoCacheError(f"cannot lock {path}: {error.strerror}", next_step=remedy if is_another_users else None)


def _holders(path: Path) -> list[str]:
    """Who holds a lock: the file says it; of a shared one, the locks of mixtures and of readers do."""
    candidates = [path]
    if path.name == CACHE_LOCK:
        candidates += sorted(path.parent.glob("mixture-*.lock"))
    holders = [_read_holder(candidate) for candidate in candidates if _is_refused(candidate, fcntl.LOCK_SH)]
    training = path.parent / TRAINING_LOCK
    if path.name == CACHE_LOCK and _is_refused(training, fcntl.LOCK_EX):
        holders.append(f"{_read_holder(training)} or an earlier one")  # the file names the last that began
    return holders or ["another process"]


def _is_refused(path: Path, mode: int) -> bool:
    try:
        file = _open(path, create=0)
    except OSError:
        return False
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _read_holder(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_HOLDER_BYTES).decode(errors="replace")
    except OSError:
        text = ""
    return "".join(letter for letter in text if letter.isprintable()) or "another process"


def _description(work: str) -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{work} (process {os.getpid()} on {socket.gethostname()} since {since})"


def _mixture_lock(mixture_name: str) -> str:
    return f"mixture-{mixture_name}.lock"

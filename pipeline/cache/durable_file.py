"""The one way a file of a cache comes to be: temporary name, write, fsync, rename, fsync of the folder.

A file is either absent or whole, whatever is killed or loses power meanwhile, and nobody ever sees it grow.
Every call to the operating system goes through :data:`operations`, so that a recorder, a full disk or a
power cut can stand in its place.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from ...errors import DpoCacheError

Bytes = bytes | bytearray | memoryview
_SYNCS_NO_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)


class FileOperations:
    """The operating system's calls a durable change is made of, and nothing else."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """Open a new file for writing; an existing one is an error, a link is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def open_existing(self, path: Path) -> int:
        """Open a file to sync it; a link is not followed."""
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)

    def write(self, file: int, data: Bytes) -> None:
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[os.write(file, rest) :]

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, source: Path, destination: Path) -> None:
        source.replace(destination)

    def remove(self, path: Path) -> None:
        path.unlink()

    def sync_folder(self, path: Path) -> None:
        """Nothing is done where the file system syncs no folders, as some that are shared with a virtual machine."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in _SYNCS_NO_FOLDERS:
                raise
        finally:
            os.close(folder)


operations = FileOperations()


def write_durably(path: Path, content: Bytes | Iterable[Bytes], *, temporary_folder: Path) -> None:
    """Write ``content`` so that ``path`` holds all of it or is as it was before.

    Args:
        path: Where the file becomes visible. A file already there is replaced as a whole.
        content: The bytes, or chunks of them. An iterable that raises leaves nothing behind.
        temporary_folder: On the same file system as ``path``; a killed write leaves a file here, see
            :func:`unfinished_writes`.

    Raises:
        DpoCacheError: The operating system refused (no space, no permission, read-only, an I/O error).
    """
    temporary = temporary_folder / f"{secrets.token_hex(8)}.partial"
    chunks = [content] if isinstance(content, Bytes) else content
    try:
        file = operations.create(temporary)
        try:
            try:
                for chunk in chunks:
                    operations.write(file, chunk)
                operations.sync(file)
            finally:
                operations.close(file)
            operations.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        operations.sync_folder(path.parent)
    except OSError as error:
        raise refused("write", path, error) from error


def unfinished_writes(temporary_folder: Path) -> list[Path]:
    """What killed calls of :func:`write_durably` have left in their temporary folder."""
    return sorted(temporary_folder.glob("[0-9a-f]" * 16 + ".partial"))


def adopt_durably(temporary: Path, path: Path) -> None:
    """Give a file that others have written in the temporary folder its name, once its bytes are on the disk.

    Raises:
        DpoCacheError: The operating system refused; the file stays where it was.
    """
    try:
        _sync_file(temporary)
        operations.rename(temporary, path)
        operations.sync_folder(path.parent)
    except OSError as error:
        raise refused("write", path, error) from error


def remove_durably(path: Path) -> None:
    """Remove one file; once this returns, a power cut does not bring it back.

    Raises:
        DpoCacheError: There is none, or the operating system refused.
    """
    try:
        operations.remove(path)
        operations.sync_folder(path.parent)
    except OSError as error:
        raise refused("remove", path, error) from error


def make_folder_durably(path: Path) -> None:
    """Make a folder and its missing parents.

    One that is there already is synced into its parent all the same: whoever made it may have died, or be
    about to, before coming to that.

    Raises:
        DpoCacheError: Something else has its name, or the operating system refused.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing or [path]):
            existed = False
            try:
                operations.make_folder(folder)
            except FileExistsError:
                if not folder.is_dir():
                    raise
                existed = True
            try:
                operations.sync_folder(folder.parent)
            except PermissionError:  # a parent that we may not read, such as a cluster's /scratch
                if not existed:
                    raise
    except OSError as error:
        raise refused("make the folder", path, error) from error


def settle_folder(path: Path) -> None:
    """Make names durable that others gave in this folder and may not have synced yet.

    Raises:
        DpoCacheError: The operating system refused.
    """
    try:
        operations.sync_folder(path)
    except OSError as error:
        raise refused("sync", path, error) from error


def settle_tree(path: Path) -> list[Path]:
    """Bring a folder that others have written, and all within it, to the disk.

    Returns:
        Its files, in order of their names.

    Raises:
        DpoCacheError: The operating system refused.
    """
    entries = sorted(path.rglob("*"))
    try:
        for entry in (*entries, path):
            if entry.is_dir():
                operations.sync_folder(entry)
            else:
                _sync_file(entry)
    except OSError as error:
        raise refused("sync", path, error) from error
    return [entry for entry in entries if entry.is_file()]


def _sync_file(path: Path) -> None:
    file = operations.open_existing(path)
    try:
        operations.sync(file)
    finally:
        operations.close(file)


def refused(what: str, path: Path, error: OSError) -> DpoCacheError:
    """That the disk did not let us do something with a file."""
    return DpoCacheError(
        f"cannot {what} {path}: {error.strerror or error}",
        next_step="check free space and permissions (df -h, ls -ld); what was finished before stays valid",
    )

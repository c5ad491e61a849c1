"""What the tensors of unchanged weight files hash to, remembered in the user's own cache folder.

An unchanged file is one of the same path, size, modification and change time in nanoseconds, inode and device.
Losing the memo costs a re-read, nothing else, so whatever is wrong with it, it counts as empty.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ...errors import DpoCacheError
from .canonical_json import JsonObject, read_sealed_json, write_sealed_json
from .durable_file import make_folder_durably
from .user_folder import user_folder

TensorDigest = tuple[str, str, list[int], str]
"""Name, dtype as safetensors spells it, shape, SHA-256 of the bytes in hex."""

MAX_FILES = 512
_MAX_BYTES = 64 << 20
SETTLED_NS = 2_000_000_000
"""A file younger than this could still change within one tick of its clock, so it is not remembered."""


class DigestMemo:
    """The memo as it was when opened, and what this process adds to it."""

    def __init__(self) -> None:
        self._files = self._read()

    @property
    def path(self) -> Path:
        """Where the memo is kept.

        Raises:
            DpoCacheError: The user has no home folder.
        """
        return user_folder() / "weight-digests.json"

    def get(self, path: Path, status: os.stat_result) -> list[TensorDigest] | None:
        """What is remembered of a file in exactly this state."""
        entry = self._files.get(str(path))
        if not isinstance(entry, dict) or entry.get("state") != file_state(status):
            return None
        tensors = entry.get("tensors")
        return [(name, dtype, shape, sha256) for name, dtype, shape, sha256 in tensors] if tensors else None

    def remember(self, digests: dict[Path, tuple[os.stat_result, list[TensorDigest]]]) -> None:
        """Add files and write the memo; a folder that cannot be written is left alone."""
        files = self._read()  # again: another build may have added its own meanwhile
        for path, (status, tensors) in digests.items():
            if time.time_ns() - max(status.st_ctime_ns, status.st_mtime_ns) > SETTLED_NS:
                files[str(path)] = {"state": file_state(status), "tensors": tensors, "at": time.time_ns()}
        newest = sorted(files.items(), key=lambda item: int(item[1].get("at", 0)))[-MAX_FILES:]
        try:
            make_folder_durably(self.path.parent)
            write_sealed_json(self.path, {"version": 1, "files": dict(newest)}, temporary_folder=self.path.parent)
        except DpoCacheError:
            return

    def _read(self) -> JsonObject:
        try:
            memo = read_sealed_json(self.path, max_bytes=_MAX_BYTES)
        except DpoCacheError:
            return {}
        files = memo.get("files")
        return files if memo.get("version") == 1 and isinstance(files, dict) else {}


def file_state(status: os.stat_result) -> list[int]:
    """What changes with a file's bytes: size, times of its last change in nanoseconds, inode and device."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]

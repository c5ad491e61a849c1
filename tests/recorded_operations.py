"""What is done to files, in the order in which it is done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dpo_cache.pipeline.cache.durable_file import Bytes, FileOperations


class RecordedOperations(FileOperations):
    """Does everything, writes down what, and fails at one call if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[str] = []
        self._fail_at = fail_at

    def _record(self, call: str) -> None:
        if len(self.calls) == self._fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.calls.append(call)

    def make_folder(self, path: Path) -> None:
        self._record(f"make_folder {path.name}")
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._record("create")
        return super().create(path)

    def open_existing(self, path: Path) -> int:
        self._record(f"open {path.name}")
        return super().open_existing(path)

    def write(self, file: int, data: Bytes) -> None:
        self._record(f"write {len(data)}")
        super().write(file, data)

    def sync(self, file: int) -> None:
        self._record("sync")
        super().sync(file)

    def rename(self, source: Path, destination: Path) -> None:
        self._record(f"rename to {destination.parent.name}/{destination.name}")
        super().rename(source, destination)

    def remove(self, path: Path) -> None:
        self._record(f"remove {path.name}")
        super().remove(path)

    def sync_folder(self, path: Path) -> None:
        self._record(f"sync_folder {path.name}")
        super().sync_folder(path)

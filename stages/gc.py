"""Remove what no mixture names: shards of builds that were given up, tables of mixtures that moved on, leftovers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.durable_file import remove_durably
from ..pipeline.cache.parquet_file import reading
from ..pipeline.cache.shard_file import SHARD_NAME
from ..pipeline.cache.unreadable_file import UnreadableFileError
from .console.byte_size import byte_size
from .console.counted_noun import counted

SECONDS_A_DAY = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """A file or folder that nothing names.

    Attributes:
        path: Where it is.
        kind: ``shard``, ``table`` or ``leftover``.
        num_bytes: Its size.
    """

    path: Path
    kind: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GarbageReport:
    """What can go, and whether it went.

    Attributes:
        cache: The cache.
        garbage: What nothing names and is old enough.
        young: How many more things nothing names, younger than ``min_age_days``.
        min_age_days: Younger files are spared.
        removed: Whether the garbage has been removed.
    """

    cache: Path
    garbage: list[Garbage]
    young: int
    min_age_days: float
    removed: bool = False

    @property
    def num_bytes(self) -> int:
        """All garbage together."""
        return sum(item.num_bytes for item in self.garbage)

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {
            "cache": str(self.cache),
            "removed": self.removed,
            "bytes": self.num_bytes,
            "spared_as_young": self.young,
            "garbage": [
                {"path": str(item.path.relative_to(self.cache)), "kind": item.kind, "bytes": item.num_bytes}
                for item in self.garbage
            ],
        }

    def text(self) -> str:
        """For an 80-column terminal."""
        counts = [f"{count} {kind}s" for kind in ("shard", "table", "leftover") if (count := self._count(kind))]
        did = "removed" if self.removed else "no mixture names"
        lines = [f"{did} {', '.join(counts)}: {byte_size(self.num_bytes)}"]
        if not counts:
            lines = ["nothing to remove: every older shard and table belongs to a mixture"]
        if self.young:
            lines.append(f"kept {counted(self.young, 'file')} younger than {self.min_age_days:g} days (--min-age-days)")
        return "\n".join(lines)

    def _count(self, kind: str) -> int:
        return sum(item.kind == kind for item in self.garbage)


def collect_garbage(path: Path, *, min_age_days: float, agree: Callable[[GarbageReport], bool]) -> GarbageReport:
    """Find what no mixture names and remove it if ``agree`` says so.

    Age protects what is in use without a name: shards of a build that was interrupted and will go on, and those of a
    training run whose mixture has been replaced since.

    Args:
        path: The cache.
        min_age_days: Files changed more recently are spared.
        agree: Shown what would go; not asked where there is nothing.

    Raises:
        DpoCacheError: There is no cache, a build or a training is running, or a pointer is damaged, so that nobody
            knows what it names.
    """
    cache = ReferenceCache.open(path)
    with cache.maintaining("a garbage collection"):
        report = _find_garbage(cache, min_age_days)
        if not report.garbage or not agree(report):
            return report
        for item in report.garbage:
            _remove(item.path)
        return replace(report, removed=True)


def _remove(path: Path) -> None:
    if not path.is_dir():
        remove_durably(path)
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise DpoCacheError(
            f"cannot remove {path}: {error.strerror}", next_step=f"ls -la {as_argument(path)}"
        ) from error


def _find_garbage(cache: ReferenceCache, min_age_days: float) -> GarbageReport:
    unnamed = [*_unnamed_files(cache), *_leftovers(cache.path / "tmp")]
    oldest_spared = time.time() - min_age_days * SECONDS_A_DAY
    old = [item for item in unnamed if item.path.lstat().st_mtime <= oldest_spared]
    return GarbageReport(cache=cache.path, garbage=old, young=len(unnamed) - len(old), min_age_days=min_age_days)


def _unnamed_files(cache: ReferenceCache) -> Iterator[Garbage]:
    try:
        mixtures = [cache.read_mixture(name) for name in cache.mixture_names()]
    except UnreadableFileError:
        raise
    except DpoCacheError as error:
        raise DpoCacheError(
            f"nobody can say what is in use: {error.found}",
            next_step=f"dpo-cache verify {as_argument(cache.path)} --repair",
        ) from error
    named = {shard.file_name for mixture in mixtures for shard in mixture.shards}
    named |= {mixture.table.path.name for mixture in mixtures}
    for kind, folder in (("shard", cache.path / "shards"), ("table", cache.path / "mixtures")):
        with reading(folder):
            for path in sorted(folder.iterdir()):
                if SHARD_NAME.fullmatch(path.name) and path.name not in named:
                    yield Garbage(path=path, kind=kind, num_bytes=path.lstat().st_size)


def _leftovers(temporary_folder: Path) -> Iterator[Garbage]:
    """Scratch folders and unfinished files of builds and pulls that were killed: none runs while we hold the lock."""
    for path in sorted(temporary_folder.iterdir()):
        if (path.name.startswith("build-") or path.name == "fetch") and path.is_dir() and not path.is_symlink():
            num_bytes = sum(file.lstat().st_size for file in path.rglob("*"))
            yield Garbage(path=path, kind="leftover", num_bytes=num_bytes)
        elif path.suffix == ".partial":
            yield Garbage(path=path, kind="leftover", num_bytes=path.lstat().st_size)

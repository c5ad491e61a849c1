"""What a power cut can leave behind: a recorded sequence of file operations, replayed up to every point.

The model is a disk that owes nothing it was not asked for. A name given in a folder (made, renamed, removed) is
durable once that folder has been synced; before, any subset of such changes may have reached the disk. The content
of a file is durable once the file has been synced; before, it may be absent, torn or whole. A rename is two
changes, one in each folder.

In ``tmp/`` nothing is ever synced and no reader looks; all or none of it is left there, unfinished files torn.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.cache.durable_file import Bytes, FileOperations

FOLDER = -1
GONE = -2


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One call, or a claim: that a caller was told something is durable."""

    kind: str
    path: Path = Path()
    destination: Path = Path()
    file: int = 0
    data: bytes = b""
    claim: tuple[str, ...] = ()


class Stopped(BaseException):
    """Stands for SIGKILL at one of the operations."""


class Recorder(FileOperations):
    """Does everything and writes it down.

    Args:
        stop_before: The number of the operation at which the process dies.
        fail_at: The number of the operation from which on the disk is full, for ``failures`` operations.
    """

    def __init__(self, *, stop_before: int | None = None, fail_at: int | None = None, failures: int = 1) -> None:
        self.operations: list[Operation] = []
        self._stop_before = stop_before
        self._failing = range(0) if fail_at is None else range(fail_at, fail_at + failures)
        self._count = 0
        self._files: dict[int, int] = {}

    def claim(self, claim: Sequence[str]) -> None:
        """Write down that something is durable from here on."""
        self.operations.append(Operation(kind="claim", claim=tuple(claim)))

    def make_folder(self, path: Path) -> None:
        self._next()
        super().make_folder(path)
        self.operations.append(Operation(kind="make_folder", path=path))

    def create(self, path: Path) -> int:
        self._next()
        file = super().create(path)
        self._files[file] = len(self.operations)
        self.operations.append(Operation(kind="create", path=path, file=self._files[file]))
        return file

    def write(self, file: int, data: Bytes) -> None:
        self._next()
        super().write(file, data)
        self.operations.append(Operation(kind="write", file=self._files[file], data=bytes(data)))

    def sync(self, file: int) -> None:
        self._next()
        self.operations.append(Operation(kind="sync", file=self._files[file]))

    def rename(self, source: Path, destination: Path) -> None:
        self._next()
        super().rename(source, destination)
        self.operations.append(Operation(kind="rename", path=source, destination=destination))

    def remove(self, path: Path) -> None:
        self._next()
        super().remove(path)
        self.operations.append(Operation(kind="remove", path=path))

    def sync_folder(self, path: Path) -> None:
        self._next()
        self.operations.append(Operation(kind="sync_folder", path=path))

    def _next(self) -> None:
        self._count += 1
        if self._count - 1 == self._stop_before:
            raise Stopped
        if self._count - 1 in self._failing:
            raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def through(operations: FileOperations) -> Iterator[None]:
    """Every durable change goes through these operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable_file, "operations", operations)
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class CrashState:
    """A disk as power comes back.

    Attributes:
        point: How many operations had been done.
        files: Content by path; None for a folder.
        claims: What callers had been told is durable.
        later: What they would have been told next.
    """

    point: int
    files: dict[Path, bytes | None]
    claims: list[list[str]]
    later: list[list[str]]

    def put(self, root: Path, destination: Path) -> None:
        """Lay the files out under ``destination`` instead of ``root``."""
        for path, content in sorted(self.files.items()):
            place = destination / path.relative_to(root)
            if content is None:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(content)


@dataclass(kw_only=True, slots=True)
class _Disk:
    root: Path
    names: dict[Path, int] = field(default_factory=dict)
    changes: list[tuple[Path, int]] = field(default_factory=list)
    written: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    latest: dict[Path, int] = field(default_factory=dict)

    def do(self, operation: Operation) -> None:
        match operation.kind:
            case "make_folder":
                self._name(operation.path, FOLDER)
            case "create":
                self.written[operation.file] = b""
                self._name(operation.path, operation.file)
            case "write":
                self.written[operation.file] += operation.data
            case "sync":
                self.synced[operation.file] = self.written[operation.file]
            case "rename":
                self._name(operation.destination, self.latest[operation.path])
                self._name(operation.path, GONE)
            case "remove":
                self._name(operation.path, GONE)
            case "sync_folder":
                for path, node in self.changes:
                    if path.parent == operation.path:
                        self.names[path] = node
                self.changes = [change for change in self.changes if change[0].parent != operation.path]

    def _name(self, path: Path, node: int) -> None:
        self.latest[path] = node
        self.changes.append((path, node))

    def leftovers(self) -> Iterator[dict[Path, bytes | None]]:
        """Every content of the disk that power can come back to."""
        unseen = [change for change in self.changes if change[0].parent.name == "tmp"]
        seen = [change for change in self.changes if change[0].parent.name != "tmp"]
        for number in range(len(seen) + 1):
            for some in itertools.combinations(seen, number):
                for rest in ([], unseen) if unseen else ([],):
                    yield from self._contents(self.names | dict([*some, *rest]))

    def _contents(self, names: dict[Path, int]) -> Iterator[dict[Path, bytes | None]]:
        """The files under these names, with each unsynced content absent, torn and whole."""
        there = {path: node for path, node in names.items() if node != GONE and self._is_reachable(path, names)}
        files = {path: node for path, node in there.items() if node != FOLDER}
        unsynced = sorted({node for path, node in files.items() if self.synced.get(node) != self.written[node]})
        visible = [
            node for node in unsynced if any(files[path] == node and path.parent.name != "tmp" for path in files)
        ]
        for chosen in itertools.product(range(3), repeat=len(visible)):
            content = self.synced | {node: self._torn(node, 1) for node in unsynced}
            content |= {node: self._torn(node, how) for node, how in zip(visible, chosen, strict=True)}
            yield {path: None if node == FOLDER else content[node] for path, node in there.items()}

    def _is_reachable(self, path: Path, names: dict[Path, int]) -> bool:
        folders = itertools.takewhile(lambda folder: folder != self.root, path.parents)
        return all(names.get(folder) == FOLDER for folder in folders)

    def _torn(self, node: int, how: int) -> bytes:
        whole = self.written[node]
        return (self.synced.get(node, b""), whole[: len(whole) // 2], whole)[how]


def crash_states(operations: Sequence[Operation], *, last: int = 0) -> Iterator[CrashState]:
    """Every state a power cut during these operations can leave, each once.

    Args:
        operations: What was done, beginning with a new folder on an otherwise empty disk.
        last: Leave out cuts before this many operations were done.
    """
    disk = _Disk(root=operations[0].path.parent)
    seen: set[int] = set()
    all_claims = [list(operation.claim) for operation in operations if operation.kind == "claim"]
    claims: list[list[str]] = []
    for point in range(len(operations) + 1):
        if point >= last:
            for files in disk.leftovers():
                known = hash((len(claims), frozenset(files.items())))
                if known not in seen:
                    seen.add(known)
                    yield CrashState(point=point, files=files, claims=list(claims), later=all_claims[len(claims) :])
        if point < len(operations):
            if operations[point].kind == "claim":
                claims.append(list(operations[point].claim))
            disk.do(operations[point])


Mutation = Callable[[Sequence[Operation]], list[Operation]]


def without_sync_of_files(operations: Sequence[Operation]) -> list[Operation]:
    """As if no file were ever synced."""
    return [operation for operation in operations if operation.kind != "sync"]


def without_sync_of(folder: Path) -> Mutation:
    """As if this folder were never synced."""
    return lambda operations: [
        operation for operation in operations if (operation.kind, operation.path) != ("sync_folder", folder)
    ]


def renamed_before_synced(operations: Sequence[Operation]) -> list[Operation]:
    """As if each file were renamed into place first and synced after that."""
    changed = list(operations)
    for place, (first, second) in enumerate(itertools.pairwise(operations)):
        if (first.kind, second.kind) == ("sync", "rename"):
            changed[place], changed[place + 1] = second, first
    return changed


def claimed_before_synced(operations: Sequence[Operation]) -> list[Operation]:
    """As if callers were told before the last folder is synced."""
    changed = list(operations)
    for place, (first, second) in enumerate(itertools.pairwise(operations)):
        if (first.kind, second.kind) == ("sync_folder", "claim"):
            changed[place], changed[place + 1] = second, first
    return changed


def as_if_slow(operations: Sequence[Operation]) -> list[Operation]:
    """As if shards came from another builder that has not yet synced and claimed them, yet they are visible."""
    slow: list[Operation] = []
    for operation in operations:
        follows_shard = slow and slow[-1].kind == "rename" and slow[-1].destination.parent.name == "shards"
        is_claim = operation.kind == "claim" and operation.claim[0] == "shard"
        if not is_claim and not (follows_shard and operation.kind == "sync_folder"):
            slow.append(operation)
    return slow

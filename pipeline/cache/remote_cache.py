"""A cache at an address: its small files are read into a folder of this machine, its shards only where they are needed.

Nothing that comes from there is believed before its digest holds, and no name from there reaches a path before it has
the form that the cache format gives it.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import DpoCacheError, as_argument
from .cache_folder import ReferenceCache
from .cache_json import MAX_CACHE_JSON_BYTES, CacheDescription
from .free_space import free_bytes
from .mixture import MIXTURE_NAME, Mixture, check_name
from .mixture_check import check_mixture
from .mixture_pointer import MAX_POINTER_BYTES, pointer_path
from .remote_files import MissingRemoteFileError, RemoteFiles, UnreachableError
from .shard_file import ShardRef, verify_shard

SIMULTANEOUS = 8
"""Shards fetched at once: one connection rarely fills a line."""
MAX_NAMED_FAULTS = 5

Reached = Callable[[int], None]
"""Told how many bytes of the shards are here by now, of :func:`num_bytes` of the mixtures'."""


def distinct_shards(mixtures: Iterable[Mixture]) -> list[ShardRef]:
    """All shards that some mixture names, each once."""
    return list({shard.sha256: shard for mixture in mixtures for shard in mixture.shards}.values())


def num_bytes(shards: Iterable[ShardRef]) -> int:
    """Their sizes together."""
    return sum(shard.num_bytes for shard in shards)


def fetch_description(files: RemoteFiles) -> CacheDescription:
    """What the cache at an address says of itself.

    Raises:
        DpoCacheError: There is no cache, or its ``cache.json`` is not what was written.
    """
    with tempfile.TemporaryDirectory() as look:
        return RemoteCache(files, Path(look)).cache.description


class RemoteCache:
    """What lies at an address, with its small files in a local ``folder`` that is itself laid out as a cache.

    Args:
        files: The files at the address.
        folder: An empty folder of this machine, to which ``cache.json`` is read at once and the rest as asked.

    Raises:
        DpoCacheError: There is no cache, or its ``cache.json`` is not what was written.
    """

    def __init__(self, files: RemoteFiles, folder: Path) -> None:
        self.files = files
        self.folder = folder
        for subfolder in ("shards", "mixtures"):
            (folder / subfolder).mkdir(exist_ok=True)
        with self._explained():
            try:
                files.fetch("cache.json", folder / "cache.json", max_bytes=MAX_CACHE_JSON_BYTES)
            except MissingRemoteFileError as error:
                raise DpoCacheError(
                    f"there is no cache at {files.address}: no cache.json, or you may not see it",
                    next_step=error.next_step,
                ) from error
            self.cache = ReferenceCache.open(folder)

    def mixture_names(self) -> list[str]:
        """Names of all mixtures at the address.

        Raises:
            DpoCacheError: The server lists no files, so nobody knows.
        """
        names = self.listed_names()
        if not names:
            raise DpoCacheError(
                f"{self.files.address} lists no mixtures: there are none, or its server does not list folders",
                next_step=f"name one: dpo-cache pull {as_argument(self.files.address)} DIR --mixture train",
            )
        return names

    def listed_names(self) -> list[str]:
        """Names of the mixtures that the server lists: none, where it lists nothing."""
        files = self.files.list_names("mixtures")
        names = [file.removesuffix(".json") for file in files if file.endswith(".json")]
        return [name for name in names if MIXTURE_NAME.fullmatch(name)]

    def mixture(self, name: str) -> Mixture:
        """Read a mixture's pointer.

        Raises:
            DpoCacheError: There is none of that name (naming those there are, where the server lists them), or it is
                not to be trusted.
        """
        check_name(name)
        try:
            with self._explained():
                pointer = pointer_path(self.folder, name)
                self.files.fetch(f"mixtures/{name}.json", pointer, max_bytes=MAX_POINTER_BYTES)
                return self.cache.read_mixture(name)
        except MissingRemoteFileError as error:
            listed = self.listed_names()
            raise DpoCacheError(
                f"{self.files.address} has no mixture {name!r}",
                expected=f"one of: {', '.join(listed)}" if listed else None,
            ) from error

    def fetch_table(self, mixture: Mixture) -> None:
        """Read a mixture's table, so that the mixture is whole but for its shards.

        Raises:
            DpoCacheError: It is missing or damaged.
        """
        with self._explained():
            table = mixture.table
            _require_room(self.folder, table.num_bytes)
            self.files.fetch(f"mixtures/{table.path.name}", table.path, max_bytes=table.num_bytes)
            mixture.table.verify()

    def fetch_shards(self, shards: Collection[ShardRef]) -> None:
        """Read shards into the folder itself, for a look at their rows.

        Raises:
            DpoCacheError: One is missing or damaged.
        """
        _require_room(self.folder, num_bytes(shards))
        with self._explained():
            for shard in shards:
                path = self.folder / "shards" / shard.file_name
                self.files.fetch(f"shards/{shard.file_name}", path, max_bytes=shard.num_bytes)
                verify_shard(path)

    def copy_mixtures(
        self,
        mixtures: Sequence[Mixture],
        cache: ReferenceCache,
        *,
        hash_present: bool,
        neighbours: Iterable[Path] = (),
        reached: Reached = lambda _bytes: None,
    ) -> list[ShardRef]:
        """Bring mixtures into a cache of the same reference, their pointers last.

        Shards that are there already are not fetched again, so a copy that was killed goes on where it was.

        Args:
            mixtures: Mixtures of this remote cache.
            cache: The cache that takes them in; this one's folder lies in its ``tmp/``.
            hash_present: Hash the shards that are there already too, and fetch those again that are damaged.
            neighbours: Other caches on the same file system: what they hold is linked instead of fetched.
            reached: Told of progress.

        Returns:
            The shards that were fetched.

        Raises:
            DpoCacheError: Something is missing or damaged at the address, named, or there is no room for it; no pointer
                of ours was written.
        """
        wanted = distinct_shards(mixtures)
        missing = [shard for shard in wanted if not _is_present(cache, shard, hash_present=hash_present)]
        rest = [shard for shard in missing if not self._link(shard, cache, neighbours)]
        _require_room(cache.path, num_bytes(rest))
        with self._explained():
            for mixture in mixtures:
                self.fetch_table(mixture)
            self._fetch_into(cache, rest, reached, num_bytes(wanted) - num_bytes(rest))
            for mixture in mixtures:
                check_mixture(cache, mixture)
                cache.import_mixture(mixture)
        return rest

    def _fetch_into(self, cache: ReferenceCache, shards: Sequence[ShardRef], reached: Reached, done: int) -> None:
        reached(done)
        faults: list[DpoCacheError] = []
        for shard, fault in _in_threads(lambda shard: self._fetch_shard(cache, shard), shards):
            if isinstance(fault, DpoCacheError) and not isinstance(fault, UnreachableError):
                faults.append(fault)  # damage: the others may be sound, and all of it is worth knowing
            elif fault is not None:
                raise fault
            done += shard.num_bytes
            reached(done)
        if faults:
            named = "; ".join(fault.found for fault in faults[:MAX_NAMED_FAULTS])
            raise DpoCacheError(
                f"{len(faults)} of {len(shards)} shards could not be fetched: {named}",
                next_step=faults[0].next_step,
            ) from faults[0]

    def _fetch_shard(self, cache: ReferenceCache, shard: ShardRef) -> None:
        fetched = self.folder / "shards" / shard.file_name
        self.files.fetch(f"shards/{shard.file_name}", fetched, max_bytes=shard.num_bytes)
        _adopt(cache, shard, fetched)

    def _link(self, shard: ShardRef, cache: ReferenceCache, neighbours: Iterable[Path]) -> bool:
        """Whether another cache of this machine had the shard; it then stands in both and takes up room once."""
        linked = self.folder / "shards" / shard.file_name
        for neighbour in neighbours:
            try:
                os.link(neighbour / "shards" / shard.file_name, linked)
                _adopt(cache, shard, linked)
                return True
            except (OSError, DpoCacheError):  # not there, on another disk, or damaged: then it is fetched
                linked.unlink(missing_ok=True)
        return False

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Faults of what came from the address name the address, not the folder it was read into."""
        try:
            yield
        except DpoCacheError as error:
            found = error.found.replace(str(self.folder), self.files.address)
            if found == error.found:
                raise
            raise DpoCacheError(
                found,
                expected=error.expected,
                next_step="nothing was made usable here; ask whoever keeps that cache to upload it again",
            ) from error


def _in_threads(
    work: Callable[[ShardRef], None], shards: Sequence[ShardRef]
) -> Iterator[tuple[ShardRef, BaseException | None]]:
    """Do some work for each shard, a few at a time; yields each shard once it is done, with its fault.

    Whoever stops listening, such as at Ctrl-C, does not wait for what is under way: a server may have fallen silent.
    """
    left, done = deque(shards), queue.SimpleQueue[tuple[ShardRef, BaseException | None]]()

    def work_off() -> None:
        while True:
            try:
                shard = left.popleft()
            except IndexError:
                return
            try:
                work(shard)
            except BaseException as fault:
                done.put((shard, fault))
            else:
                done.put((shard, None))

    for _ in range(min(SIMULTANEOUS, len(shards))):
        threading.Thread(target=work_off, name="fetch", daemon=True).start()
    try:
        for _ in shards:
            yield done.get()
    finally:
        left.clear()


def _is_present(cache: ReferenceCache, shard: ShardRef, *, hash_present: bool) -> bool:
    path = cache.shards.path_of(shard)
    if not path.is_file() or path.stat().st_size != shard.num_bytes:
        return False
    if hash_present:
        try:
            verify_shard(path)
        except DpoCacheError:
            return False
    return True


def _require_room(path: Path, needed: int) -> None:
    free = free_bytes(path)
    if needed > free:
        raise DpoCacheError(
            f"{needed / 2**30:,.1f} GiB are to be fetched into {path}, where {free / 2**30:,.1f} GiB are free",
            next_step=f"make room there (df -h {as_argument(path)}), or use another disk",
        )


def _adopt(cache: ReferenceCache, shard: ShardRef, fetched: Path) -> None:
    adopted = cache.shards.adopt(fetched)
    if adopted != shard:
        raise DpoCacheError(
            f"{fetched} has {adopted.num_rows} rows and {adopted.num_bytes} bytes",
            expected=f"{shard.num_rows} rows and {shard.num_bytes} bytes, as its mixture states",
        )

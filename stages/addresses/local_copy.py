"""Caches at an address as local folders: what is read from there is kept in the user's cache folder and used again."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.durable_file import make_folder_durably
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.mixture_pointer import pointer_path
from ...pipeline.cache.remote_cache import RemoteCache, distinct_shards, fetch_description, num_bytes
from ...pipeline.cache.remote_files import RemoteFiles
from ...pipeline.cache.shard_file import ShardRef
from ...pipeline.cache.user_folder import user_folder
from ..console.progress import Progress
from .location import Location, is_address


def local_copy(location: Location, mixture_names: Sequence[str] | None = None, *, hash_present: bool = False) -> Path:
    """A folder with these mixtures of a cache, whole; that of a local cache is its own.

    Pointers are read again each time. Shards and tables, whose names are their digests, are fetched once ever. Every
    process of a machine may ask at the same time: one fetches, the others wait and find everything there.

    Args:
        location: A folder, or an address.
        mixture_names: Which mixtures; None for all there are.
        hash_present: Hash what was fetched before, and fetch again what this machine's disk has damaged since.

    Raises:
        DpoCacheError: There is no such cache or mixture, something of it is damaged, or it cannot be read.
    """
    if not is_address(location):
        return Path(location)
    files = RemoteFiles.open(str(location))
    description = fetch_description(files)
    home = _home()
    folder = home / _folder_name(files.address, description.identity.digest)
    copy = ReferenceCache.create(folder, description)
    with copy.fetching() as fetched:
        remote = RemoteCache(files, fetched)
        names = mixture_names or remote.mixture_names()
        mixtures = [remote.mixture(name) for name in names]
        changed = [mixture for mixture in mixtures if hash_present or not _is_whole(copy, mixture)]
        if changed:
            neighbours = [path for path in home.iterdir() if path != folder]
            total = num_bytes(distinct_shards(changed))
            with Progress(total, unit="B", title=f"fetch {files.address}") as progress:
                remote.copy_mixtures(
                    changed, copy, hash_present=hash_present, neighbours=neighbours, reached=progress.reach
                )
        if mixture_names is None:
            for name in set(copy.mixture_names()) - set(names):  # gone at the address
                copy.retire_mixture(name)
    return folder


@contextmanager
def glance(
    location: Location, mixture_names: Sequence[str] | None = None, *, first_rows: int | None = None
) -> Iterator[Path]:
    """A cache as a folder for as long as it is looked at, with no more of it than that needs.

    Args:
        location: A folder, or an address.
        mixture_names: Which mixtures; None for all there are.
        first_rows: With the tables, and the shards that hold so many first rows; None for the pointers alone.

    Raises:
        DpoCacheError: As :func:`local_copy`.
    """
    if not is_address(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as look:
        remote = RemoteCache(RemoteFiles.open(str(location)), Path(look))
        for name in mixture_names or remote.mixture_names():
            mixture = remote.mixture(name)
            if first_rows is not None:
                remote.fetch_table(mixture)
                remote.fetch_shards(_shards_of_first(mixture, first_rows))
        yield Path(look)


def _shards_of_first(mixture: Mixture, rows: int) -> list[ShardRef]:
    numbers = np.unique(mixture.table.column("shard")[:rows])
    return [mixture.shards[number] for number in numbers.tolist() if 0 <= number < len(mixture.shards)]


def _is_whole(copy: ReferenceCache, mixture: Mixture) -> bool:
    """Whether the copy has the mixture as the address has it now."""
    pointer = pointer_path(copy.path, mixture.name)
    theirs = mixture.table.path.with_name(pointer.name)
    return (
        pointer.is_file()
        and pointer.read_bytes() == theirs.read_bytes()
        and (copy.path / "mixtures" / mixture.table.path.name).is_file()
        and all(copy.shards.path_of(shard).is_file() for shard in mixture.shards)
    )


def _home() -> Path:
    home = user_folder() / "remote"
    try:
        make_folder_durably(home)
    except DpoCacheError as refused:
        raise DpoCacheError(
            refused.found, next_step="set XDG_CACHE_HOME to a folder that you may write to, on a disk with room"
        ) from refused
    return home


def _folder_name(address: str, reference_id: str) -> str:
    """For people who look for what to delete; another reference at the same address gets a folder of its own."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", address).strip("-")[:80]
    return f"{readable}-{hashlib.sha256(f'{address} {reference_id}'.encode()).hexdigest()[:12]}"

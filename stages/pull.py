"""Copy a shared cache into a folder of this machine: every digest is checked, pointers come last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.remote_cache import RemoteCache, distinct_shards, fetch_description, num_bytes
from ..pipeline.cache.remote_files import RemoteFiles
from .addresses.location import hub_address, is_address
from .console.byte_size import byte_size
from .console.next_command import training_commands
from .console.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class PullReport:
    """What a pull brought.

    Attributes:
        address: Where from.
        commit: Of the repository on the Hub; None elsewhere.
        cache: The folder.
        mixtures: Training pairs of each mixture that was asked for.
        shards: How many shards they have.
        fetched: How many of those were not there yet.
        fetched_bytes: Their bytes.
    """

    address: str
    commit: str | None
    cache: str
    mixtures: dict[str, int]
    shards: int
    fetched: int
    fetched_bytes: int

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        commit = f" @ {self.commit[:12]}" if self.commit else ""
        return "\n".join(
            [
                f"{self.address}{commit}",
                f"{self.cache}: fetched {self.fetched} of {self.shards} shards, {byte_size(self.fetched_bytes)}; "
                "every digest holds",
                *(f"mixture {name}: {pairs:,} training pairs" for name, pairs in self.mixtures.items()),
                training_commands(self.cache, self.mixtures),
            ]
        )


def pull(
    source: str, path: Path, *, revision: str | None, mixture_names: Sequence[str] = (), replace: bool = False
) -> PullReport:
    """Copy mixtures of a cache at an address into a cache here, made if there is none.

    Args:
        source: ``ORG/NAME`` of a dataset repository on the Hub, or any address.
        path: The folder. Shards that it has already are checked, not fetched again.
        revision: Branch, tag or commit of the repository [default: main].
        mixture_names: Only these; all of them where there are none.
        replace: A mixture here that is another training set than its namesake there gives way to it.

    Raises:
        DpoCacheError: There is no such cache or mixture, something of it is damaged (naming the files), or it cannot
            be read; or the folder holds something else, another reference, or another mixture of that name. Then no
            pointer is written.
    """
    address = _address(source, revision)
    files = RemoteFiles.open(address)
    cache = ReferenceCache.create(path, fetch_description(files))
    with ExitStack() as held:
        remote = RemoteCache(files, held.enter_context(cache.fetching()))
        names = list(dict.fromkeys(mixture_names)) or remote.mixture_names()
        mixtures = [remote.mixture(name) for name in names]
        for mixture in mixtures:
            held.enter_context(cache.building(mixture.name))
            if not replace:
                _refuse_another_mixture(cache, mixture, address)
        shards = distinct_shards(mixtures)
        with Progress(num_bytes(shards), unit="B", title=f"pull {source}") as progress:
            fetched = remote.copy_mixtures(mixtures, cache, hash_present=True, reached=progress.reach)
    return PullReport(
        address=address,
        commit=files.commit,
        cache=str(path),
        mixtures={mixture.name: mixture.num_pairs for mixture in mixtures},
        shards=len(shards),
        fetched=len(fetched),
        fetched_bytes=num_bytes(fetched),
    )


def _address(source: str, revision: str | None) -> str:
    if not is_address(source):
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", source):
            raise DpoCacheError(f"{source!r} names no cache to pull", expected="ORG/NAME on the Hub, or an address")
        return hub_address(source, revision)
    if revision is not None:
        raise DpoCacheError(
            f"--revision has no effect on the address {source}",
            next_step="leave it out; on the Hub, write hf://datasets/ORG/NAME@REVISION",
        )
    return source


def _refuse_another_mixture(cache: ReferenceCache, theirs: Mixture, address: str) -> None:
    if theirs.name not in cache.mixture_names():
        return
    ours = cache.read_mixture(theirs.name)
    if ours.digest != theirs.digest:
        raise DpoCacheError(
            f"mixture {ours.name} of {cache.path} is another training set ({ours.num_pairs:,} pairs, digest "
            f"{ours.digest[:16]}…) than that of {address} ({theirs.num_pairs:,} pairs, {theirs.digest[:16]}…)",
            next_step="pull into another folder, or let theirs take its place with --replace",
        )

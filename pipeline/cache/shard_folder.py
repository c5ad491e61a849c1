"""The ``shards/`` of a cache: scored pairs of one reference, in files named by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from .digest_named_file import write_digest_named
from .durable_file import adopt_durably
from .folder_content import entries_of
from .key_index import KeyIndex, build_key_index
from .parquet_file import reading
from .reference_identity import ReferenceIdentity
from .scored_pair import ScoredPair
from .shard_file import SHARD_NAME, ShardReader, ShardRef, verify_shard
from .shard_writer import write_shard
from .unreadable_file import UnreadableFileError

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusableShard:
    """A file in ``shards/`` that this cache cannot use, and why."""

    path: Path
    reason: str


class ShardFolder:
    """The shards of a cache; reading needs no lock and no write.

    Args:
        cache_path: The cache's folder.
        identity: Its reference: shards of another are refused.
    """

    def __init__(self, cache_path: Path, identity: ReferenceIdentity) -> None:
        self._cache_path = cache_path
        self._folder = cache_path / "shards"
        self._identity = identity
        self._reference_id = identity.digest

    def path_of(self, shard: ShardRef) -> Path:
        """Where a shard stands, if it does."""
        return self._folder / shard.file_name

    def paths(self) -> list[Path]:
        """The shards by ascending digest, which is the order in which duplicate keys resolve."""
        return [path for path in entries_of(self._folder) if SHARD_NAME.fullmatch(path.name)]

    def open(self, path: Path) -> ShardReader:
        """Open a shard.

        Raises:
            DpoCacheError: It cannot be read, or belongs to another reference.
        """
        shard = ShardReader(path)
        if shard.reference_id != self._reference_id:
            shard.close()
            raise DpoCacheError(
                f"{path} belongs to the reference {shard.reference_id[:16]}…",
                expected=f"{self._reference_id[:16]}…, the reference of {self._cache_path}",
            )
        return shard

    def unusable(self) -> list[UnusableShard]:
        """Hash and open every file of ``shards/``: those that cannot be relied on, and what is wrong with each.

        Raises:
            UnreadableFileError: The system could not read one: that is no reason to score its rows again.
        """
        faults = ((path, self._fault_of(path)) for path in entries_of(self._folder))
        return [UnusableShard(path=path, reason=fault) for path, fault in faults if fault is not None]

    # ---- where each key stands ----

    def key_index(self, *, without: Collection[Path] = (), with_token_logps: bool = False) -> KeyIndex:
        """Where each key stands. Of the shards only footers, keys and sums over the common part are read.

        Args:
            without: Shards that :meth:`unusable` named. One that has been written anew since, as scoring its rows
                again does, counts.
            with_token_logps: Only of shards with log-probabilities per token.

        Raises:
            DpoCacheError: A shard cannot be read or belongs to another reference; :meth:`unusable` finds them.
        """
        usable = (path for path in self.paths() if path not in without or self._fault_of(path) is None)
        return self.index_of(usable, with_token_logps=with_token_logps)

    def index_of(self, paths: Iterable[Path], *, with_token_logps: bool = False) -> KeyIndex:
        """Where each key of these shards stands; see :meth:`key_index`.

        Raises:
            DpoCacheError: As :meth:`key_index`.
        """
        indexed, detailed, incomplete = [], set(), set()
        for path in paths:
            with self.open(path) as shard:
                if shard.has_token_logps:
                    detailed.add(path.stem)
                elif with_token_logps:
                    continue
                elif shard.has_unknown_values:
                    incomplete.add(path.stem)
                indexed.append((shard.ref, shard.keys()))
        return build_key_index(indexed, with_token_logps=detailed, with_unknown_values=incomplete)

    # ---- new shards ----

    def write(self, rows: Sequence[ScoredPair], *, recorded: Mapping[str, Any] | None = None) -> ShardRef:
        """Write one finished unit; see :func:`~.shard_writer.write_shard`."""
        return write_shard(
            self._folder,
            rows,
            reference_id=self._reference_id,
            scoring_version=self._identity.scoring_version,
            recorded=recorded or {},
            temporary_folder=self._cache_path / "tmp",
        )

    def import_copy(self, source: Path) -> bool:
        """Copy another folder's shard of the same reference, verifying its digest on the way.

        Returns:
            Whether it was copied; one that is here and whole is left as it is.

        Raises:
            DpoCacheError: It is damaged, of another reference or format, or its name is no digest.
        """
        self._ref(source)
        return write_digest_named(
            self._folder / source.name, verified_chunks(source), temporary_folder=self._cache_path / "tmp"
        )

    def adopt(self, fetched: Path) -> ShardRef:
        """Take over a shard that was fetched into ``tmp/``: it becomes visible once it is verified and durable.

        Raises:
            DpoCacheError: It is damaged, of another reference or format, or its name is no digest.
        """
        verify_shard(fetched)
        shard = self._ref(fetched)
        adopt_durably(fetched, self._folder / fetched.name)
        return shard

    def _fault_of(self, path: Path) -> str | None:
        """What is wrong with a shard; None where it can be used."""
        try:
            verify_shard(path)
            self.open(path).close()
        except UnreadableFileError:
            raise
        except DpoCacheError as error:
            return error.found
        return None

    def _ref(self, path: Path) -> ShardRef:
        with self.open(path) as shard:
            return shard.ref


def verified_chunks(source: Path) -> Iterator[bytes]:
    """The bytes of a file named by its digest, in chunks.

    Raises:
        DpoCacheError: At the end, where they were not those.
    """
    digest = hashlib.sha256()
    with reading(source), source.open("rb") as stream:
        while chunk := stream.read(_COPY_BYTES):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != source.stem:
        raise DpoCacheError(f"{source} is damaged: its bytes have the SHA-256 {digest.hexdigest()[:12]}…")

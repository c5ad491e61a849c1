"""A dataset repository on the Hugging Face Hub that a cache is uploaded to: what is there, and sending the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.mixture_pointer import pointer_bytes
from ...pipeline.cache.remote_cache import RemoteCache, num_bytes
from ...pipeline.cache.remote_files import RemoteFiles
from ...pipeline.cache.shard_file import ShardRef, verify_shard
from ..addresses.location import hub_address
from ..console.progress import Progress
from .cache_card import cache_card
from .hub_access import LOGGED_IN, MAIN_BRANCH, make_writable, refusals_explained

BATCH_BYTES = 1 << 30
"""Shards of about so much make a commit: what an upload that is killed starts again with at most."""
BATCH_FILES = 64
MAX_BATCHES = 100
"""The Hub allows some hundred commits an hour; larger caches have larger batches."""


MAX_CARD_BYTES = 16 << 20


class HubDataset:
    """One branch of it.

    Attributes:
        repo_id: ``ORG/NAME``.
        revision: The branch.
        url: The dataset's page.
    """

    def __init__(self, repo_id: str, revision: str) -> None:
        disable_progress_bars()  # ours is the one that tells how far the whole is
        self._api = HfApi()
        self._place: dict[str, Any] = {"repo_id": repo_id, "repo_type": "dataset"}
        self.repo_id = repo_id
        self.revision = revision
        self._files: dict[str, str | None] = {}
        """What is there, with the SHA-256 of each file that is stored as a large one."""
        self._commit: str | None = None
        self._card: str | None = None
        self.url = f"{self._api.endpoint}/datasets/{repo_id}"

    def prepare(self, *, public: bool) -> bool:
        """Make sure that it is there and may be written to; whether it is private.

        Raises:
            DpoCacheError: The Hub refuses, or others would see what is not meant for them.
        """
        with refusals_explained(
            f"nothing can be uploaded to {self.repo_id}",
            expected=LOGGED_IN,
            next_step="run `hf auth login`, and check the name",
        ):
            self._api.whoami()
            make_writable(self._api, self.repo_id, repo_type="dataset", private=not public, branch=self.revision)
            is_private = bool(self._api.repo_info(**self._place).private)
        if public == is_private:
            is_now, flag = ("private", "without --public") if is_private else ("public", "with --public")
            raise DpoCacheError(
                f"{self.repo_id} is there already, and it is {is_now}",
                next_step=f"push {flag}, or change its visibility in its settings: {self.url}/settings",
            )
        return is_private

    def cache_there(self, folder: Path, cache: ReferenceCache) -> list[Mixture]:
        """The mixtures that earlier uploads brought; remembers which files there are.

        Raises:
            DpoCacheError: They are of another reference.
        """
        with refusals_explained(f"{self.repo_id} cannot be read"):
            self._commit = self._api.repo_info(**self._place, revision=self.revision).sha
            entries = list(self._api.list_repo_tree(**self._place, recursive=True, revision=self.revision))
        for entry in entries:
            if isinstance(entry, RepoFile):
                self._files[entry.path] = entry.lfs.sha256 if entry.lfs else None
        files = RemoteFiles.open(hub_address(self.repo_id, self.revision))
        if "README.md" in self._files:
            files.fetch("README.md", folder / "README.md", max_bytes=MAX_CARD_BYTES)
            self._card = (folder / "README.md").read_text(encoding="utf-8")
        if "cache.json" not in self._files:
            return []
        remote = RemoteCache(files, folder)
        remote.cache.require_reference(cache.identity)
        return [remote.mixture(name) for name in remote.listed_names()]

    def has_shard(self, shard: ShardRef) -> bool:
        """Whether exactly these bytes are there."""
        return self._files.get(f"shards/{shard.file_name}") == shard.sha256

    def upload_shards(self, cache: ReferenceCache, shards: Sequence[ShardRef]) -> None:
        """Send shards, a commit for each batch; ``cache.json`` goes with the first, so that it says whose they are."""
        done = 0
        with Progress(num_bytes(shards), unit="B", title=f"push {self.repo_id}") as progress:
            for batch in _batches(shards):
                paths = [cache.shards.path_of(shard) for shard in batch]
                for path in paths:
                    verify_shard(path)
                files = [*self._cache_json(cache), *paths]
                self._send([_addition(cache, path) for path in files], f"Add {len(batch)} shards")
                done += num_bytes(batch)
                progress.reach(done)

    def upload_pointers(self, cache: ReferenceCache, ours: Sequence[Mixture], all_there: Sequence[Mixture]) -> None:
        """Send tables, pointers and card in one commit: there is no moment in which one is there without the others.

        The pointers are those that were read, not what their files say by now.
        """
        names = ", ".join(mixture.name for mixture in ours)
        tables = [mixture.table.path for mixture in ours]
        branch = None if self.revision == MAIN_BRANCH else self.revision
        card = cache_card(self.repo_id, cache, all_there, branch=branch, previous=self._card)
        operations = [_addition(cache, path) for path in [*self._cache_json(cache), *tables]]
        operations += [CommitOperationAdd(f"mixtures/{mixture.name}.json", pointer_bytes(mixture)) for mixture in ours]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        # Only on top of what the card was made from: somebody else may be uploading another mixture.
        self._send(operations, f"Mixture {names}", parent_commit=self._commit)

    def _cache_json(self, cache: ReferenceCache) -> list[Path]:
        return [] if "cache.json" in self._files else [cache.path / "cache.json"]

    def _send(self, operations: list[CommitOperationAdd], message: str, **more: Any) -> None:
        with refusals_explained(
            f"the upload to {self.repo_id} failed", next_step="the same command goes on from there"
        ):
            commit = self._api.create_commit(
                **self._place, operations=operations, commit_message=message, revision=self.revision, **more
            )
        self._commit = commit.oid
        self._files |= {operation.path_in_repo: None for operation in operations}


def _batches(shards: Sequence[ShardRef]) -> Iterator[list[ShardRef]]:
    batch: list[ShardRef] = []
    most_bytes = max(BATCH_BYTES, num_bytes(shards) // MAX_BATCHES)
    most_files = max(BATCH_FILES, len(shards) // MAX_BATCHES)
    for shard in shards:
        if batch and (len(batch) == most_files or num_bytes(batch) + shard.num_bytes > most_bytes):
            yield batch
            batch = []
        batch.append(shard)
    if batch:
        yield batch


def _addition(cache: ReferenceCache, path: Path) -> CommitOperationAdd:
    return CommitOperationAdd(path.relative_to(cache.path).as_posix(), path)

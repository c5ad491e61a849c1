"""Upload a cache as a dataset of the Hugging Face Hub: permission first, shards next, pointers and card last."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.mixture_check import check_mixture
from ..pipeline.cache.remote_cache import RemoteCache, distinct_shards, num_bytes
from ..pipeline.cache.remote_files import RemoteFiles
from ..pipeline.cache.shard_file import ShardRef, verify_shard
from .cache_card import cache_card
from .progress import Progress

MAIN_BRANCH = "main"
BATCH_BYTES = 1 << 30
"""Shards of about so much make a commit: what an upload that is killed starts again with at most."""
BATCH_FILES = 64
MAX_BATCHES = 100
"""The Hub allows some hundred commits an hour; larger caches have larger batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport:
    """What an upload did.

    Attributes:
        repo_id, revision: Where to.
        url: The dataset's page.
        private: Whether only its owners see it.
        mixtures: Training pairs of each mixture that was uploaded.
        shards: How many shards they have.
        uploaded: How many of those were not there yet.
        uploaded_bytes: Their bytes.
        warnings: What others will stumble over.
    """

    repo_id: str
    revision: str
    url: str
    private: bool
    mixtures: dict[str, int]
    shards: int
    uploaded: int
    uploaded_bytes: int
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        at_revision = "" if self.revision == MAIN_BRANCH else f"@{self.revision}"
        return "\n".join(
            [
                *(f"warning: {warning}" for warning in self.warnings),
                f"{self.url} ({'private' if self.private else 'public'})",
                f"uploaded {self.uploaded} of {self.shards} shards, {self.uploaded_bytes / 2**20:,.1f} MiB",
                *(f"mixture {name}: {pairs:,} training pairs" for name, pairs in self.mixtures.items()),
                "next: state the licence in its README, then anyone who may see it can",
                f"  dpo-train --cache hf://datasets/{self.repo_id}{at_revision} --output runs/first",
            ]
        )


def push(
    path: Path,
    repo_id: str,
    *,
    revision: str = MAIN_BRANCH,
    public: bool = False,
    mixture_names: Sequence[str] = (),
) -> PushReport:
    """Upload mixtures and the shards they name, and no others; what is there already is not sent again.

    Args:
        path: The cache.
        repo_id: ``ORG/NAME``; the repository is made if there is none.
        revision: Branch; made if there is none.
        public: Make a public repository, or agree that the existing one is.
        mixture_names: Only these; all of the cache where there are none.

    Raises:
        DpoCacheError: A mixture is not whole; the Hub does not know the user or does not let them write there; the
            repository holds another reference, or is public without ``public``; or an upload failed. What was sent
            before stays, and no pointer to anything that was not.
    """
    cache = ReferenceCache.open(path)
    mixtures = [cache.read_mixture(name) for name in dict.fromkeys(mixture_names or cache.mixture_names())]
    if not mixtures:
        raise DpoCacheError(f"{path} has no mixture yet: no build has finished", next_step="run dpo-cache build again")
    repository = _Repository(repo_id, revision)
    private = repository.prepare(public=public)
    with tempfile.TemporaryDirectory() as look:
        there = repository.cache_there(Path(look), cache)
        for mixture in mixtures:
            check_mixture(cache, mixture)
        shards = distinct_shards(mixtures)
        missing = [shard for shard in shards if not repository.has_shard(shard)]
        repository.upload_shards(cache, missing)
        others = [mixture for mixture in there if mixture.name not in {ours.name for ours in mixtures}]
        repository.upload_pointers(cache, mixtures, sorted([*mixtures, *others], key=lambda one: one.name))
    return PushReport(
        repo_id=repo_id,
        revision=revision,
        url=repository.url,
        private=private,
        mixtures={mixture.name: mixture.num_pairs for mixture in mixtures},
        shards=len(shards),
        uploaded=len(missing),
        uploaded_bytes=num_bytes(missing),
        warnings=_warnings(cache, mixtures),
    )


class _Repository:
    """A dataset repository on the Hub, at one branch.

    Args:
        repo_id: ``ORG/NAME``.
        revision: The branch.
    """

    def __init__(self, repo_id: str, revision: str) -> None:
        disable_progress_bars()  # ours is the one that tells how far the whole is
        self._api = HfApi()
        self._place: dict[str, Any] = {"repo_id": repo_id, "repo_type": "dataset"}
        self._repo_id = repo_id
        self._revision = revision
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
        try:
            self._api.whoami()
            self._api.create_repo(**self._place, private=not public, exist_ok=True)
            self._api.auth_check(**self._place, write=True)
            is_private = bool(self._api.repo_info(**self._place).private)
            if self._revision != MAIN_BRANCH:
                self._api.create_branch(**self._place, branch=self._revision, exist_ok=True)
        except Exception as error:  # the client raises a dozen kinds of errors, of its own and of its HTTP library
            raise DpoCacheError(
                f"nothing can be uploaded to {self._repo_id}: {_first_line(error)}",
                expected="to be logged in to the Hub with a token that may write there",
                next_step="run `hf auth login`, and check the name",
            ) from error
        if public == is_private:
            is_now, flag = ("private", "without --public") if is_private else ("public", "with --public")
            raise DpoCacheError(
                f"{self._repo_id} is there already, and it is {is_now}",
                next_step=f"push {flag}, or change its visibility in its settings: {self.url}/settings",
            )
        return is_private

    def cache_there(self, folder: Path, cache: ReferenceCache) -> list[Mixture]:
        """The mixtures that earlier uploads brought; remembers which files there are.

        Raises:
            DpoCacheError: They are of another reference.
        """
        try:
            self._commit = self._api.repo_info(**self._place, revision=self._revision).sha
            entries = list(self._api.list_repo_tree(**self._place, recursive=True, revision=self._revision))
        except Exception as error:  # as above
            raise DpoCacheError(f"{self._repo_id} cannot be read: {_first_line(error)}") from error
        for entry in entries:
            if isinstance(entry, RepoFile):
                self._files[entry.path] = entry.lfs.sha256 if entry.lfs else None
        files = RemoteFiles.open(f"hf://datasets/{self._repo_id}@{self._revision.replace('/', '%2F')}")
        if "README.md" in self._files:
            files.fetch("README.md", folder / "README.md")
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
        with Progress(num_bytes(shards), unit="B", title=f"push {self._repo_id}") as progress:
            for batch in _batches(shards):
                paths = [cache.path / "shards" / shard.file_name for shard in batch]
                for path in paths:
                    verify_shard(path)
                files = [*self._cache_json(cache), *paths]
                self._send([_addition(cache, path) for path in files], f"Add {len(batch)} shards")
                done += num_bytes(batch)
                progress.reach(done)

    def upload_pointers(self, cache: ReferenceCache, ours: Sequence[Mixture], all_there: Sequence[Mixture]) -> None:
        """Send tables, pointers and card in one commit: there is no moment in which one is there without the others."""
        names = ", ".join(mixture.name for mixture in ours)
        tables = [mixture.table.path for mixture in ours]
        pointers = [cache.path / "mixtures" / f"{mixture.name}.json" for mixture in ours]
        branch = None if self._revision == MAIN_BRANCH else self._revision
        card = cache_card(self._repo_id, cache, all_there, branch=branch, previous=self._card)
        operations = [_addition(cache, path) for path in [*self._cache_json(cache), *tables, *pointers]]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        # Only on top of what the card was made from: somebody else may be uploading another mixture.
        self._send(operations, f"Mixture {names}", parent_commit=self._commit)

    def _cache_json(self, cache: ReferenceCache) -> list[Path]:
        return [] if "cache.json" in self._files else [cache.path / "cache.json"]

    def _send(self, operations: list[CommitOperationAdd], message: str, **more: Any) -> None:
        try:
            commit = self._api.create_commit(
                **self._place, operations=operations, commit_message=message, revision=self._revision, **more
            )
        except Exception as error:  # as above
            raise DpoCacheError(
                f"the upload to {self._repo_id} failed: {_first_line(error)}",
                next_step="the same command goes on from there",
            ) from error
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


def _warnings(cache: ReferenceCache, mixtures: Sequence[Mixture]) -> list[str]:
    """Names of folders in sealed files cannot be changed without breaking the seal."""
    paths = [str(cache.recorded.get("model"))]
    paths += [str(source.get("path")) for mixture in mixtures for source in mixture.sources]
    local = [path for path in dict.fromkeys(paths) if Path(path).is_absolute() or path.startswith((".", "~"))]
    if not local:
        return []
    return [
        f"the sealed files name folders of this machine, as the build was given them: {', '.join(local)}; others see "
        "these names, and say where their copy of the reference is with dpo-train --model"
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

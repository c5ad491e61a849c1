"""Upload a cache as a dataset of the Hugging Face Hub: permission first, shards next, pointers and card last."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.mixture_check import check_mixture
from ..pipeline.cache.remote_cache import distinct_shards, num_bytes
from .addresses.location import hub_address
from .console.byte_size import byte_size
from .hub.hub_access import MAIN_BRANCH
from .hub.hub_dataset import HubDataset
from .hub.recorded_reference import RecordedReference


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
        address = hub_address(self.repo_id, None if self.revision == MAIN_BRANCH else self.revision)
        return "\n".join(
            [
                *(f"warning: {warning}" for warning in self.warnings),
                f"{self.url} ({'private' if self.private else 'public'})",
                f"uploaded {self.uploaded} of {self.shards} shards, {byte_size(self.uploaded_bytes)}",
                *(f"mixture {name}: {pairs:,} training pairs" for name, pairs in self.mixtures.items()),
                "next: state the licence in its README, then anyone who may see it can",
                f"  dpo-train --cache {address} --output runs/first",
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

    Meanwhile others may build, and nobody may delete.

    Args:
        path: The cache.
        repo_id: ``ORG/NAME``; the repository is made if there is none.
        revision: Branch; made if there is none.
        public: Make a public repository, or agree that the existing one is.
        mixture_names: Only these; all of the cache where there are none.

    Raises:
        DpoCacheError: A mixture is not whole; something deletes in the cache; the Hub does not know the user or does
            not let them write there; the repository holds another reference, or is public without ``public``; or an
            upload failed. What was sent before stays, and no pointer to anything that was not.
    """
    cache = ReferenceCache.open(path)
    with cache.in_use_by("an upload"):
        # As they are now: whatever a build makes of these names meanwhile, these pointers are uploaded, after all that
        # they name.
        mixtures = [cache.read_mixture(name) for name in dict.fromkeys(mixture_names or cache.mixture_names())]
        if not mixtures:
            raise DpoCacheError(
                f"{path} has no mixture yet: no build has finished", next_step="run dpo-cache build again"
            )
        return _upload(cache, mixtures, HubDataset(repo_id, revision), public=public)


def _upload(cache: ReferenceCache, mixtures: Sequence[Mixture], repository: HubDataset, *, public: bool) -> PushReport:
    private = repository.prepare(public=public)
    with tempfile.TemporaryDirectory() as look:
        there = repository.cache_there(Path(look), cache)
        for mixture in mixtures:
            check_mixture(cache, mixture)
        shards = distinct_shards(mixtures)
        missing = [shard for shard in shards if not repository.has_shard(shard)]
        repository.upload_shards(cache, missing)
        if missing:  # which may have taken hours: others may have brought mixtures since, and written into the card
            there = repository.cache_there(Path(look), cache)
        others = [mixture for mixture in there if mixture.name not in {ours.name for ours in mixtures}]
        repository.upload_pointers(cache, mixtures, sorted([*mixtures, *others], key=lambda one: one.name))
    return PushReport(
        repo_id=repository.repo_id,
        revision=repository.revision,
        url=repository.url,
        private=private,
        mixtures={mixture.name: mixture.num_pairs for mixture in mixtures},
        shards=len(shards),
        uploaded=len(missing),
        uploaded_bytes=num_bytes(missing),
        warnings=_warnings(cache, mixtures),
    )


def _warnings(cache: ReferenceCache, mixtures: Sequence[Mixture]) -> list[str]:
    """Names of folders in sealed files cannot be changed without breaking the seal."""
    recorded = RecordedReference.of(cache.recorded)
    named = [recorded.model, recorded.adapter]
    for mixture in mixtures:
        named += [mixture.settings.get("tokenizer"), mixture.settings.get("chat_template")]
        named += [source.get("path") for source in mixture.sources]
    paths = [path for path in dict.fromkeys(named) if isinstance(path, str)]
    local = [path for path in paths if Path(path).is_absolute() or path.startswith((".", "~"))]
    if not local:
        return []
    return [
        f"the sealed files name folders of this machine, as the build was given them: {', '.join(local)}; others see "
        "these names, and say where their copy of the reference is with dpo-train --model"
    ]

"""Look at every byte of a cache, name what is wrong, and take it away on request so that a build refills just that."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.cache_json import MAX_CACHE_JSON_BYTES
from ..pipeline.cache.canonical_json import read_sealed_json
from ..pipeline.cache.durable_file import make_folder_durably, remove_durably
from ..pipeline.cache.example_key import Keys, example_key, key_at
from ..pipeline.cache.folder_content import entries_of, refuse_linked_subfolders
from ..pipeline.cache.folder_lock import maintenance_lock, reading_lock
from ..pipeline.cache.key_index import KeyIndex, build_key_index
from ..pipeline.cache.mixture import MIXTURE_NAME, Mixture
from ..pipeline.cache.mixture_check import check_mixture
from ..pipeline.cache.mixture_pointer import pointer_path
from ..pipeline.cache.parquet_file import KEY_COLUMN, file_sha256
from ..pipeline.cache.shard_file import SHARD_NAME, ShardReader, ShardRef, verify_shard
from ..pipeline.cache.unreadable_file import UnreadableFileError
from .addresses.local_copy import local_copy
from .addresses.location import Location, is_address
from .console.counted_noun import counted
from .console.progress import Progress
from .verifying.rescore_report import RescoreReport
from .verifying.rescore_settings import RescoreSettings
from .verifying.verify_report import Finding, FindingKind, Repair, VerifyReport

Lengths = npt.NDArray[np.int32]
"""Numbers of prompt, chosen and rejected ids, shape (rows, 3)."""
SIDES = ("prompt", "chosen", "rejected")
WITHOUT_CACHE_JSON = (
    "; nothing else can be judged without it. Without the file, the next build with the same reference writes it again "
    "and keeps all shards"
)


def verify_cache(location: Location, *, repair: bool = False, rescoring: RescoreSettings | None = None) -> VerifyReport:
    """Check every shard, table and pointer of a cache.

    Args:
        location: The cache. One at an address is copied, and the copy checked; what an earlier copy has damaged is
            fetched again.
        repair: Retire the mixtures that depend on something wrong, then remove what is wrong.
        rescoring: Also score a sample again; values off by more than rounding count as findings.

    Raises:
        DpoCacheError: There is no cache; or something deletes in it; or it is in use, or only to be read, where it is
            to be repaired; or the reference that is to score again is not the one that scored; or a file could not be
            read, which is no finding: nothing has been taken away then.
    """
    if repair and is_address(location):
        raise DpoCacheError(
            f"{location} is read-only: --repair works on folders",
            next_step=f"pull a copy, repair that, and upload it again: dpo-cache pull {as_argument(location)} DIR",
        )
    try:
        return _verify(local_copy(location, hash_present=True), repair=repair, rescoring=rescoring)
    except MemoryError as error:
        raise DpoCacheError(
            "there is not enough memory to verify the cache", next_step="free some (free -h), then try again"
        ) from error


def _verify(path: Path, *, repair: bool, rescoring: RescoreSettings | None) -> VerifyReport:
    refuse_linked_subfolders(path)  # before a lock file is made in one
    walk = _Walk(path)
    if not repair:
        with reading_lock(path / "tmp", "a verification"):  # what a compaction moves meanwhile would look missing
            walk.look(rescoring)
        return walk.report()
    if not (path / "cache.json").exists():
        ReferenceCache.open(path)  # tells that there is no cache
    make_folder_durably(path / "tmp")
    with maintenance_lock(path / "tmp", "a repair"):
        walk.look(rescoring)
        return walk.report(repair=walk.take_away_what_is_wrong())


@dataclass(slots=True)
class _Walk:
    """One walk over a cache: findings as they turn up, and what could be relied on."""

    path: Path
    findings: list[Finding] = field(default_factory=list)
    shards: list[tuple[ShardRef, Keys]] = field(default_factory=list)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    with_token_logps: set[str] = field(default_factory=set)
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    index: KeyIndex = field(default_factory=lambda: build_key_index([]))
    rescored: RescoreReport | None = None

    def look(self, rescoring: RescoreSettings | None) -> None:
        """Look at everything, shards first: mixtures are judged by them."""
        if not self._cache_json_holds():
            return
        cache = ReferenceCache.open(self.path)
        self._walk_shards(cache)
        self.index = build_key_index(self.shards, with_token_logps=self.with_token_logps)
        if rescoring is not None:
            self._rescore(cache, rescoring)
        self._walk_mixtures(cache)

    def take_away_what_is_wrong(self) -> Repair:
        """Remove what there are findings about, so that a build refills just that."""
        # A mixture goes before anything it names, so that whatever stops us, no pointer promises what is not there.
        retired = [name for name in sorted(self._broken_mixtures()) if pointer_path(self.path, name).exists()]
        for name in retired:
            remove_durably(pointer_path(self.path, name))
        removed, left = [], []
        for relative in dict.fromkeys(finding.path for finding in self.findings):
            file = self.path / relative
            if file.is_dir() and not file.is_symlink():
                left.append(relative)
            elif file.exists() or file.is_symlink():
                remove_durably(file)
                removed.append(relative)
        return Repair(retired=retired, removed=removed, left=left)

    def report(self, *, repair: Repair | None = None) -> VerifyReport:
        """What was found, and what was done about it."""
        broken = self._broken_mixtures()
        return VerifyReport(
            path=self.path,
            shards=len(self.shards),
            pairs=len(self.index),
            duplicates=self.index.num_duplicates,
            mixtures={name: mixture.num_pairs for name, mixture in self.mixtures.items() if name not in broken},
            findings=self.findings,
            rescored=self.rescored,
            repair=repair,
        )

    # ---- the walk ----------------------------------------------------------------------------------------------------

    def _cache_json_holds(self) -> bool:
        source = self.path / "cache.json"
        if not source.exists():
            return True  # opening it tells that there is no cache
        with self._damage_is(FindingKind.DAMAGED_CACHE_JSON, source, more=WITHOUT_CACHE_JSON):
            read_sealed_json(source, max_bytes=MAX_CACHE_JSON_BYTES)
            return True
        return False

    def _walk_shards(self, cache: ReferenceCache) -> None:
        entries = _entries(self.path / "shards")
        with Progress(len(entries), unit="shard", title="verify") as progress:
            for done, path in enumerate(entries, start=1):
                self._examine_shard(cache, path)
                progress.reach(done)

    def _examine_shard(self, cache: ReferenceCache, path: Path) -> None:
        if not SHARD_NAME.fullmatch(path.name):
            self._find(FindingKind.STRAY_FILE, path, "the name of a shard is the SHA-256 of its bytes")
            return
        with self._damage_is(FindingKind.DAMAGED_SHARD, path):
            verify_shard(path)
            with self._damage_is(FindingKind.UNUSABLE_SHARD, path), ShardReader(path) as shard:
                self._examine_rows(cache, shard)

    def _examine_rows(self, cache: ReferenceCache, shard: ShardReader) -> None:
        if shard.reference_id != cache.reference_id:
            ours, theirs = cache.reference_id[:16], shard.reference_id[:16]
            self._find(FindingKind.FOREIGN_SHARD, shard.path, f"it belongs to the reference {theirs}…, not to {ours}…")
            return
        wrong, lengths = _wrong_keys_and_lengths(shard)
        if wrong:
            self._find(
                FindingKind.WRONG_KEYS, shard.path, f"{len(wrong)} of {shard.num_rows} rows: {', '.join(wrong[:10])}"
            )
            return
        self.shards.append((shard.ref, shard.keys()))
        self.lengths[shard.ref.sha256] = lengths
        if shard.has_token_logps:
            self.with_token_logps.add(shard.ref.sha256)

    def _rescore(self, cache: ReferenceCache, settings: RescoreSettings) -> None:
        from .verifying.rescore import rescore  # PyTorch with it, seconds of imports

        self.rescored = rescore(cache, self.index, settings)
        for shard, outliers in self.rescored.outliers.items():
            self._find(
                FindingKind.WRONG_VALUES,
                self.path / "shards" / f"{shard}.parquet",
                f"{len(outliers)} pairs: {', '.join(key.hex() for key in outliers[:10])}",
            )

    def _walk_mixtures(self, cache: ReferenceCache) -> None:
        for path in _entries(self.path / "mixtures"):
            if path.suffix == ".json" and MIXTURE_NAME.fullmatch(path.stem):
                self._examine_mixture(cache, path)
            elif not SHARD_NAME.fullmatch(path.name) or not path.is_file():
                self._find(FindingKind.STRAY_FILE, path, "neither a mixture's pointer nor a table")
            elif (found := file_sha256(path)) != path.stem:
                self._find(FindingKind.DAMAGED_TABLE, path, f"its bytes have the SHA-256 {found[:12]}…")

    def _examine_mixture(self, cache: ReferenceCache, pointer: Path) -> None:
        name = pointer.stem
        with self._damage_is(FindingKind.DAMAGED_POINTER, pointer, mixture=name):
            self.mixtures[name] = cache.read_mixture(name)
        mixture = self.mixtures.get(name)
        if mixture is None:
            return
        missing = [path for shard in mixture.shards if not (path := self.path / "shards" / shard.file_name).exists()]
        for path in missing:
            self._find(FindingKind.MISSING_SHARD, path, f"mixture {name} names it", mixture=name)
        with self._damage_is(FindingKind.BROKEN_MIXTURE, pointer, mixture=name):
            check_mixture(cache, mixture)
            _check_counts(mixture)
            _check_lengths(mixture, self.lengths)

    # ---- what depends on what ----------------------------------------------------------------------------------------

    def _broken_mixtures(self) -> set[str]:
        """Mixtures with a finding of their own, or with a shard or table that has one."""
        files = {Path(finding.path).name for finding in self.findings}
        of_their_own = {finding.mixture for finding in self.findings if finding.mixture is not None}
        return of_their_own | {
            name
            for name, mixture in self.mixtures.items()
            if mixture.table.path.name in files or any(shard.file_name in files for shard in mixture.shards)
        }

    @contextmanager
    def _damage_is(
        self, kind: FindingKind, path: Path, *, mixture: str | None = None, more: str = ""
    ) -> Iterator[None]:
        """What goes wrong inside is a finding; a file that could not be read is none, and ends the walk."""
        try:
            yield
        except UnreadableFileError:
            raise
        except DpoCacheError as error:
            self._find(kind, path, f"{error.found}{more}", mixture=mixture)

    def _find(self, kind: FindingKind, path: Path, detail: str, *, mixture: str | None = None) -> None:
        relative = str(path.relative_to(self.path))
        self.findings.append(Finding(kind=kind, path=relative, detail=detail, mixture=mixture))


def _entries(folder: Path) -> list[Path]:
    entries = entries_of(folder)
    for path in entries:
        if path.exists() and not os.access(path, os.R_OK):
            # Not damage: a repair must not take away what another user wrote. Told before hours of looking.
            raise DpoCacheError(f"you may not read {path}", next_step=f"ask its owner for: chmod a+r {path}")
    return entries


def _wrong_keys_and_lengths(shard: ShardReader) -> tuple[list[str], Lengths]:
    """Keys that are not those of their rows, in hex, and the rows' lengths.

    Reading the rows checks ids, masks, counts and values.
    """
    wrong: list[str] = []
    lengths = np.empty((shard.num_rows, len(SIDES)), dtype=np.int32)
    for group, first_row in enumerate(shard.group_starts.tolist()):
        rows = shard.read_row_group(group)
        for index in range(len(rows)):
            pair = rows.scored_pair(index).pair
            lengths[first_row + index] = [len(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
            if example_key(pair) != (stated := key_at(rows.keys, index)):
                wrong.append(stated.hex())
    return wrong, lengths


def _check_counts(mixture: Mixture) -> None:
    """The pointer's counts are those of the table."""
    counted: dict[str, int] = {
        side: int(mixture.table.column(f"{side}_length").sum(dtype=np.int64)) for side in mixture.num_ids
    }
    counted["distinct pairs"] = len(np.unique(mixture.table.column(KEY_COLUMN)))
    stated = {**mixture.num_ids, "distinct pairs": mixture.num_distinct_pairs}
    if counted != stated:
        raise DpoCacheError(f"the pointer states the counts {stated}, the table has {counted}")


def _check_lengths(mixture: Mixture, lengths: Mapping[str, Lengths]) -> None:
    """The table's lengths are those of the rows, by which training fills its batches."""
    if any(shard.sha256 not in lengths for shard in mixture.shards):
        return  # which there is a finding about already
    shards, rows = mixture.table.column("shard"), mixture.table.column("row")
    first_rows = np.cumsum([0, *(shard.num_rows for shard in mixture.shards)])
    of_rows = np.concatenate([lengths[shard.sha256] for shard in mixture.shards])[first_rows[shards] + rows]
    stated = np.stack([mixture.table.column(f"{side}_length") for side in SIDES], axis=1)
    if differing := int((of_rows != stated).any(axis=1).sum()):
        raise DpoCacheError(f"{mixture.table.path} states other lengths than {counted(differing, 'row')} have")

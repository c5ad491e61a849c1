"""The cache as a folder: ``cache.json``, ``shards/``, ``mixtures/`` and ``tmp/``, of one reference."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError, as_argument
from ..data.token_pair import TokenPair
from .cache_json import WRITE_AGAIN, CacheDescription, has_description, read_description, write_description
from .canonical_json import JsonObject
from .digest_named_file import write_digest_named
from .durable_file import make_folder_durably, remove_durably, settle_folder
from .example_key import KEY_BYTES, example_key
from .folder_content import (
    SUBFOLDERS,
    entries_of,
    other_content,
    refuse_linked_subfolders,
    refuse_other_content,
    refuse_shards_of_others,
)
from .folder_lock import building_lock, creation_lock, fetching_lock, maintenance_lock, reading_lock
from .key_index import KeyIndex
from .mixture import MIXTURE_NAME, Mixture, check_name
from .mixture_pointer import pointer_path, read_pointer, write_pointer
from .mixture_rows import MixtureRows
from .mixture_writer import write_mixture
from .pair_lookup import PairLookup
from .pair_order import epoch_order
from .pair_stream import PairStream
from .parquet_file import reading
from .reference_identity import ReferenceIdentity, differences, differences_in_words
from .scored_pair import ScoredPair
from .shard_folder import ShardFolder, verified_chunks

_READ_PAIRS = 1024


class ReferenceCache:
    """An existing cache folder, from :meth:`create` or :meth:`open`. Reading needs no lock and writes nothing.

    Attributes:
        path: The folder.
        identity: Which reference, under which numerics, its values are of.
        reference_id: The identity's digest, which every shard and mixture repeats.
        vocabulary_sha256: The vocabulary of the first build's tokenizer.
        recorded: What stood beside the identity when the cache was made: names, revisions, versions.
        description: All of these, as ``cache.json`` has them.
        shards: The shards.
    """

    def __init__(self, path: Path, description: CacheDescription) -> None:
        self.path = path
        self.description = description
        self.identity = description.identity
        self.reference_id = description.identity.digest
        self.vocabulary_sha256 = description.vocabulary_sha256
        self.recorded = description.recorded
        self.shards = ShardFolder(path, description.identity)
        self._lookup: PairLookup | None = None

    @classmethod
    def create(cls, path: Path, description: CacheDescription) -> ReferenceCache:
        """Make a cache, or open the one that is there if it is of the same reference.

        Once this returns, everything visible in it survives a power cut, whoever wrote it. A ``cache.json`` that is
        damaged or missing is written anew where the shards say that the cache is of this reference.

        Raises:
            DpoCacheError: The folder holds something else, or a cache or shards of another reference (naming every
                field that differs, where that can be known), or cannot be written.
        """
        refuse_other_content(path)
        refuse_linked_subfolders(path)
        for folder in (path, *(path / name for name in SUBFOLDERS)):
            make_folder_durably(folder)
        with creation_lock(path / "tmp"):
            if not has_description(path):
                refuse_shards_of_others(path, description.identity)
                write_description(path, description)
        cache = cls.open(path)
        cache.require_reference(description.identity)
        for folder in (path, path / "shards", path / "mixtures"):
            settle_folder(folder)
        return cache

    @classmethod
    def planned(cls, path: Path, description: CacheDescription) -> ReferenceCache | None:
        """The cache that :meth:`create` would open, as it is now; None where it would begin one. Nothing is written.

        Raises:
            DpoCacheError: As :meth:`create`.
        """
        refuse_other_content(path)
        if has_description(path):
            cache = cls.open(path)
            cache.require_reference(description.identity)
            return cache
        refuse_shards_of_others(path, description.identity)
        return cls(path, description) if path.exists() else None

    @classmethod
    def open(cls, path: Path | str) -> ReferenceCache:
        """Open a cache; nothing is written.

        Raises:
            DpoCacheError: There is none, its ``cache.json`` is damaged, or its format version is unknown.
        """
        path = Path(path)
        if not (path / "cache.json").exists():
            if entries_of(path / "shards"):
                raise DpoCacheError(f"cache.json of {path} is missing", next_step=WRITE_AGAIN)
            strange = other_content(path) if path.exists() else []
            if strange:  # no build would make a cache of it
                raise DpoCacheError(
                    f"there is no cache in {path}: it holds {', '.join(strange[:5])}, and no cache.json",
                    expected="the folder of a cache",
                )
            raise DpoCacheError(
                f"there is no cache in {path}: cache.json is missing",
                next_step=f"make one with: dpo-cache build --cache {as_argument(path)} --model … --dataset …",
            )
        refuse_linked_subfolders(path)
        return cls(path, read_description(path))

    def require_reference(self, identity: ReferenceIdentity) -> None:
        """Refuse another reference.

        Raises:
            DpoCacheError: Naming each field that differs, with both its values.
        """
        found = differences(self.identity, identity)
        if found:
            is_empty = not any((self.path / "shards").iterdir()) and not self.mixture_names()  # a build that failed
            raise DpoCacheError(
                f"{self.path} {'was begun for' if is_empty else 'holds the values of'} another reference "
                f"({differences_in_words(found)})",
                next_step=f"nothing is scored in it yet: delete the folder {self.path}, or give another --cache"
                if is_empty
                else "give another --cache for this reference, or the model and options that this cache was built with",
            )

    # ---- pairs -------------------------------------------------------------------------------------------------------

    def pairs(self, mixture: str = "train", *, seed: int | None = None, epoch: int = 0) -> Iterator[ScoredPair]:
        """The training pairs of a mixture, one after another; memory does not grow with the cache.

        Every shard's digest and every row's key is checked before it is handed out. Ids are views that must not be
        written to.

        Args:
            mixture: Its name.
            seed: None for the mixture's own order, pairs of one prompt side by side; or the seed of a shuffle, the
                one that ``dpo-train`` goes by.
            epoch: From 0; with a seed, each epoch has an order of its own.

        Raises:
            DpoCacheError: There is no such mixture, or what it names is missing or damaged.
        """
        opened = self.read_mixture(mixture)
        order = np.arange(opened.num_pairs, dtype=np.int32)
        if seed is not None:
            order = epoch_order(
                num_pairs=opened.num_pairs,
                block_rows=opened.block_rows,
                seed=seed,
                epoch=epoch,
                mixture_digest=opened.digest,
            )
        with closing(PairStream(self, opened)) as stream:
            for start in range(0, len(order), _READ_PAIRS):
                yield from stream.read(order[start : start + _READ_PAIRS])

    def find(self, key: bytes) -> ScoredPair | None:
        """The pair with this key (32 bytes), whatever its mixture; None if the cache does not hold it.

        The first call reads the keys of all shards, 40 bytes a pair of memory; shards written later are not seen.

        Raises:
            DpoCacheError: ``key`` is no key, or a shard is damaged.
        """
        if len(key) != KEY_BYTES:
            raise DpoCacheError(f"a key of {len(key)} bytes was asked for", expected=f"{KEY_BYTES} bytes")
        if self._lookup is None:
            self._lookup = PairLookup(self)
        return self._lookup.find(key)

    def find_tokens(
        self,
        prompt_ids: npt.ArrayLike,
        chosen_ids: npt.ArrayLike,
        rejected_ids: npt.ArrayLike,
        scored_mask: npt.ArrayLike | None = None,
    ) -> ScoredPair | None:
        """The pair with exactly these tokens, found as :meth:`find` does.

        Args:
            prompt_ids: Token ids that both answers begin with.
            chosen_ids: Token ids of the preferred answer.
            rejected_ids: Token ids of the other.
            scored_mask: Which of all three, laid end to end, are scored; None for every answer token and no other.

        Raises:
            DpoCacheError: The mask has another length than the tokens, or a shard is damaged.
        """
        pair = TokenPair(
            prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
            chosen_ids=np.asarray(chosen_ids, dtype=np.int32),
            rejected_ids=np.asarray(rejected_ids, dtype=np.int32),
            scored_mask=None if scored_mask is None else np.asarray(scored_mask, dtype=np.bool_),
        )
        if pair.scored_mask is not None and len(pair.scored_mask) != pair.shared_prefix_tokens:
            raise DpoCacheError(
                f"the mask has {len(pair.scored_mask)} entries for {pair.shared_prefix_tokens} tokens",
                expected="one for each token of prompt, chosen and rejected",
            )
        return self.find(example_key(pair))

    # ---- mixtures and locks ------------------------------------------------------------------------------------------

    def mixture_names(self) -> list[str]:
        """Names of the mixtures that have a pointer, sorted; files with other names are ignored."""
        folder = self.path / "mixtures"
        with reading(folder):
            pointers = sorted(folder.glob("*.json")) if folder.exists() else []
            return [path.stem for path in pointers if MIXTURE_NAME.fullmatch(path.stem)]

    def read_mixture(self, name: str) -> Mixture:
        """Read a mixture's pointer; see :func:`~.mixture_pointer.read_pointer`.

        Raises:
            DpoCacheError: There is none of that name (naming those there are), or it is not to be trusted.
        """
        check_name(name)
        if not pointer_path(self.path, name).exists():
            there_are = ", ".join(self.mixture_names()) or "none"
            raise DpoCacheError(
                f"{self.path} has no mixture {name!r}",
                expected=f"one of: {there_are}",
                next_step=f"build it with: dpo-cache build --cache {as_argument(self.path)} --mixture {name} …",
            )
        mixture = read_pointer(self.path, name)
        if mixture.reference_id != self.reference_id:
            raise DpoCacheError(f"mixture {name} of {self.path} belongs to another reference")
        return mixture

    def write_mixture(
        self,
        name: str,
        rows: MixtureRows,
        *,
        key_index: KeyIndex,
        tokenization: JsonObject,
        sources: list[JsonObject],
        dropped: JsonObject,
    ) -> Mixture:
        """Write a mixture, pointer last; see :func:`~.mixture_writer.write_mixture`."""
        return write_mixture(
            self.path,
            name,
            rows,
            reference_id=self.reference_id,
            key_index=key_index,
            tokenization=tokenization,
            sources=sources,
            dropped=dropped,
        )

    def import_mixture(self, mixture: Mixture) -> None:
        """Copy a mixture of another folder of this reference whose shards have all been imported.

        Raises:
            DpoCacheError: It is of another reference, its table is damaged, or a shard of it is not here.
        """
        if mixture.reference_id != self.reference_id:
            raise DpoCacheError(f"mixture {mixture.name} belongs to another reference")
        here = {path.name for path in self.shards.paths()}
        missing = [shard.sha256 for shard in mixture.shards if shard.file_name not in here]
        if missing:
            raise DpoCacheError(f"{len(missing)} shards of mixture {mixture.name} are missing: {missing[0]}, …")
        mixture.table.verify()
        destination = self.path / "mixtures" / mixture.table.path.name
        write_digest_named(destination, verified_chunks(mixture.table.path), temporary_folder=self.path / "tmp")
        write_pointer(self.path, mixture)

    def retire_mixture(self, name: str) -> None:
        """Remove a mixture's pointer, so that nothing trains from it until it is built again."""
        check_name(name)
        remove_durably(pointer_path(self.path, name))

    def building(self, mixture_name: str) -> AbstractContextManager[None]:
        """The lock of a builder; see :func:`~.folder_lock.building_lock`."""
        check_name(mixture_name)
        return building_lock(self.path / "tmp", mixture_name)

    def training(self) -> AbstractContextManager[None]:
        """The lock of a training, where one can be had; see :func:`~.folder_lock.reading_lock`."""
        return self.in_use_by("a training")

    def in_use_by(self, work: str) -> AbstractContextManager[None]:
        """The lock of what reads for hours, where one can be had; see :func:`~.folder_lock.reading_lock`."""
        with suppress(DpoCacheError):  # a copy of a cache may lack a folder that was empty, and be read-only
            make_folder_durably(self.path / "tmp")
        return reading_lock(self.path / "tmp", work)

    @contextmanager
    def fetching(self) -> Iterator[Path]:
        """An empty folder in ``tmp/`` for what is fetched from elsewhere, by one process at a time; others wait.

        What a killed process left there is cleared first, so that it never adds up.

        Raises:
            DpoCacheError: It cannot be cleared, or another process deletes in this cache.
        """
        with fetching_lock(self.path / "tmp"):
            folder = self.path / "tmp" / "fetch"
            shutil.rmtree(folder, ignore_errors=True)
            if os.path.lexists(folder):  # what comes from a stranger can hold a link here, and lead us out of the cache
                raise DpoCacheError(
                    f"{folder} cannot be cleared",
                    expected="a folder that this user may remove, and no link",
                    next_step=f"rm -r {as_argument(folder)}",
                )
            for subfolder in (folder, folder / "shards", folder / "mixtures"):
                make_folder_durably(subfolder)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def maintaining(self, work: str) -> AbstractContextManager[None]:
        """The lock of what deletes; see :func:`~.folder_lock.maintenance_lock`."""
        make_folder_durably(self.path / "tmp")  # a copy of a cache may lack a folder that was empty
        return maintenance_lock(self.path / "tmp", work)

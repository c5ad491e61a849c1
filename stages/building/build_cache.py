"""The cache that a build or an import fills: begun, looked over, waited for."""

from __future__ import annotations

import platform
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.cache_json import CacheDescription
from ...pipeline.cache.durable_file import make_folder_durably
from ...pipeline.data.pair_tokenizer import PairTokenizer
from ..console.terminal import say
from ..processes.job_store import POLL_S, RUN_AGAIN
from .build_config import BuildConfig
from .build_reference import BuildReference

VISIBLE_WITHIN_S = 120.0
"""NFS keeps what it knows of a folder for up to a minute."""


def open_cache(config: BuildConfig, reference: BuildReference, *, recorded: dict[str, Any]) -> ReferenceCache:
    """The cache of a build, begun where there is none; says so where it was begun with another vocabulary.

    Args:
        config: Names its folder.
        reference: The reference, and how its tokens are made.
        recorded: What a new cache keeps about its origin.

    Raises:
        DpoCacheError: It is one of another reference, or no cache.
    """
    description = description_of(reference, recorded=recorded)
    cache = ReferenceCache.create(config.cache, description)
    if (vocabulary := description.vocabulary_sha256) != cache.vocabulary_sha256:
        say(
            f"warning: the tokenizer's vocabulary ({vocabulary[:12]}…) is not the one this cache was begun with "
            f"({cache.vocabulary_sha256[:12]}…): the same ids may stand for other words"
        )
    return cache


def description_of(reference: BuildReference, *, recorded: dict[str, Any] | None = None) -> CacheDescription:
    """What a cache that begins with this reference says of itself."""
    vocabulary = PairTokenizer(reference.tokenization).description()["vocabulary_sha256"]
    return CacheDescription(identity=reference.identity, vocabulary_sha256=vocabulary, recorded=recorded or {})


def recorded_environment(reference: BuildReference) -> dict[str, Any]:
    """What stands beside a reference's identity, for people: names and versions, none of which is compared."""
    libraries = ["dpo-cache", "torch", "transformers", "pyarrow"]
    libraries += ["bitsandbytes"] if reference.identity.quantization else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {**reference.names(), "device": device, "libraries": {name: version(name) for name in libraries}}


def damaged_shards(cache: ReferenceCache) -> list[Path]:
    """Shards that cannot be relied on, each named; their pairs are scored again."""
    unusable = cache.shards.unusable()
    for shard in unusable:
        say(f"warning: {shard.path.name} is not used: {shard.reason}")
    return [shard.path for shard in unusable]


def wait_until_visible(cache: ReferenceCache, shards: Collection[str]) -> None:
    """Wait for shards that other machines wrote: a shared file system may show them late.

    Raises:
        DpoCacheError: Some are still not there after two minutes.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while hidden := set(shards) - {path.name for path in cache.shards.paths()}:
        if time.monotonic() > deadline:
            raise DpoCacheError(
                f"{len(hidden)} shards that scoring processes wrote are not to be seen in {cache.path}: {min(hidden)}",
                expected="a cache folder on a file system that all nodes share, and that nobody clears meanwhile",
                next_step=RUN_AGAIN,
            )
        time.sleep(POLL_S)


@contextmanager
def scratch_folder(temporary_folder: Path) -> Iterator[Path]:
    """A folder for this build's spool and plan, gone when the build ends.

    Those of killed builds are removed by gc, which another user of a shared cache may start: its permissions are those
    that the umask gives, not the private ones of a temporary folder.
    """
    folder = temporary_folder / f"build-{secrets.token_hex(8)}"
    make_folder_durably(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

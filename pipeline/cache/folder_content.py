"""What a folder holds before it is taken for a cache: nothing strange, no links, no shards of another reference."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import DpoCacheError
from .cache_json import salvaged_identity
from .parquet_file import reading
from .reference_identity import ReferenceIdentity, differences, differences_in_words
from .shard_file import ShardReader
from .unreadable_file import UnreadableFileError

SUBFOLDERS = ("shards", "mixtures", "tmp")


def refuse_other_content(path: Path) -> None:
    """Refuse a folder that is neither empty nor a cache: it was named by mistake.

    Raises:
        DpoCacheError: It holds something else, or is a file.
    """
    if not path.exists() or (path / "cache.json").exists():
        return
    strange = other_content(path)
    if strange:
        raise DpoCacheError(
            f"{path} is not a cache and not empty: it holds {', '.join(strange[:5])}",
            expected="a cache, an empty folder, or a folder that does not exist yet",
        )


def other_content(path: Path) -> list[str]:
    """Names in a folder that no cache has.

    Raises:
        DpoCacheError: It is a file, or cannot be listed.
    """
    try:
        return sorted(set(os.listdir(path)) - {*SUBFOLDERS, "cache.json"})
    except OSError as error:
        raise DpoCacheError(f"{path} cannot be a cache: {error.strerror}", expected="a folder") from error


def refuse_linked_subfolders(path: Path) -> None:
    """Refuse links in the place of subfolders: through them a cache from elsewhere would write outside itself.

    Raises:
        DpoCacheError: One of them is a link.
    """
    for subfolder in (path / name for name in SUBFOLDERS):
        if subfolder.is_symlink():
            raise DpoCacheError(f"{subfolder} is a symbolic link", expected="a folder; link the whole cache instead")


def refuse_shards_of_others(path: Path, identity: ReferenceIdentity) -> None:
    """Refuse a folder without a readable ``cache.json`` whose shards are not, or not all, of this reference.

    A shard says whose it is. One that cannot be read says nothing: its rows are scored again.

    Raises:
        DpoCacheError: Naming the other reference, and the fields that differ where a damaged ``cache.json`` still
            says what it is.
    """
    shards = entries_of(path / "shards")
    others = sorted({_reference_of(shard) for shard in shards} - {identity.digest, None}, key=str)
    if not others:
        return
    state = "damaged" if (path / "cache.json").exists() else "missing"
    salvaged = salvaged_identity(path)
    fields = ""
    if salvaged is not None and salvaged.digest in others:
        fields = f" ({differences_in_words(differences(salvaged, identity))})"
    raise DpoCacheError(
        f"cache.json of {path} is {state}, and its shards hold values of the reference {str(others[0])[:16]}…; this "
        f"one is {identity.digest[:16]}…{fields}",
        next_step="build once with the reference that they are of, which writes cache.json again and keeps them; for "
        "this one, use another --cache folder",
    )


def entries_of(folder: Path) -> list[Path]:
    """Whatever lies in a folder, sorted; empty where there is no such folder."""
    with reading(folder):
        return sorted(folder.iterdir()) if folder.exists() else []


def _reference_of(shard: Path) -> str | None:
    try:
        with ShardReader(shard) as reader:
            return reader.reference_id
    except UnreadableFileError:
        raise
    except DpoCacheError:
        return None

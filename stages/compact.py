"""Tidy the shards: of rows that stand in several keep one, and put the rows of many small shards into few.

Builds that run at once may score the same pair. Every build writes shards of its own, so after hundreds of small ones
there are hundreds of small files, all of which reading in a shuffled order has to keep open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.canonical_json import JsonObject, canonical_bytes
from ..pipeline.cache.durable_file import remove_durably
from ..pipeline.cache.example_key import keys_array, prompt_hash_prefix
from ..pipeline.cache.key_index import KeyIndex
from ..pipeline.cache.row_reader import RowReader
from .building.build_plan import MAX_UNIT_TOKENS, cut_into
from .building.mixture_content import MixtureContent
from .building.pair_collection import SpooledPairs
from .console.progress import Progress

SMALL_SHARD_IDS = MAX_UNIT_TOKENS // 2
"""Below this a shard is joined with others of its kind. What comes of that is larger, but for the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What was tidied.

    Attributes:
        cache: The cache.
        dropped_rows: Rows that another shard holds too.
        shards_before: Shards there were.
        shards_after: Shards there are.
        rewritten_mixtures: Mixtures whose rows have moved; their training sets are the same.
    """

    cache: str
    dropped_rows: int
    shards_before: int
    shards_after: int
    rewritten_mixtures: list[str]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        if not self.dropped_rows and self.shards_before == self.shards_after:
            return "nothing to do: every pair stands in one shard, and no two small shards could be one"
        return f"dropped {self.dropped_rows:,} rows; {self.shards_before} shards became {self.shards_after}"


def compact(path: Path) -> CompactReport:
    """Keep one row of each pair, and join small shards; no row, order or training set changes.

    At every moment each mixture's pointer names rows that are there: first come the new shards, then the mixtures over
    to them, then the old shards go. Memory holds keys and places of the rows that move, and one new shard.

    Args:
        path: The cache.

    Raises:
        DpoCacheError: There is no cache, a build or a training is running, or something in the cache is damaged.
    """
    cache = ReferenceCache.open(path)
    with cache.maintaining("compacting"):
        if unusable := cache.shards.unusable():
            raise DpoCacheError(
                f"{len(unusable)} shards of {path} cannot be used, the first: {unusable[0].reason}",
                next_step=f"dpo-cache verify {as_argument(path)} --repair",
            )
        index = cache.shards.key_index()
        outdated = _rewrite_shards(cache, index)
        moved = _move_mixtures(cache, outdated)
        for shard in outdated:
            remove_durably(shard)
        return CompactReport(
            cache=str(path),
            dropped_rows=index.num_duplicates,
            shards_before=len(index.shards),
            shards_after=len(cache.shards.paths()),
            rewritten_mixtures=moved,
        )


def _rewrite_shards(cache: ReferenceCache, index: KeyIndex) -> list[Path]:
    """Write anew what is kept of the shards that lose rows or are small, and return these."""
    outdated: set[Path] = set()
    written: set[Path] = set()
    with closing(RowReader(cache, index.shards)) as reader:
        for recorded, numbers in _kinds(cache, index):
            outdated |= {cache.shards.path_of(index.shards[number]) for number in numbers}
            written |= _write_together(cache, index, reader, numbers, recorded)
    return sorted(outdated - written)  # one that is made of the very rows of an old one is that file


def _kinds(cache: ReferenceCache, index: KeyIndex) -> Iterator[tuple[JsonObject, list[int]]]:
    """Numbers of the shards whose rows move, those that were scored alike together, with what is recorded of it."""
    loses_rows: defaultdict[bytes, list[int]] = defaultdict(list)
    is_small: defaultdict[bytes, list[int]] = defaultdict(list)
    recorded: dict[bytes, JsonObject] = {}
    kept = np.bincount(index.shard_numbers, minlength=len(index.shards))
    for number, shard in enumerate(index.shards):
        with cache.shards.open(cache.shards.path_of(shard)) as reader:
            kind = canonical_bytes([reader.recorded, reader.has_token_logps])
            recorded[kind] = reader.recorded
            if kept[number] < shard.num_rows:
                loses_rows[kind].append(number)
            elif reader.num_ids < SMALL_SHARD_IDS:
                is_small[kind].append(number)
    for kind, description in recorded.items():
        small = is_small[kind] if len(is_small[kind]) + len(loses_rows[kind]) > 1 else []
        if moving := [*loses_rows[kind], *small]:
            yield description, moving


def _write_together(
    cache: ReferenceCache, index: KeyIndex, reader: RowReader, numbers: Sequence[int], recorded: JsonObject
) -> set[Path]:
    """Write the kept rows of some shards as new ones, in the order in which a build would have; gives their paths."""
    places = np.flatnonzero(np.isin(index.shard_numbers, numbers))
    places = places[np.lexsort((index.rows[places], index.shard_numbers[places]))]  # as they lie on the disk
    written: set[Path] = set()
    with Progress(2 * len(places), unit="row", title="compact") as progress:
        rows = _described(index, reader, places)
        progress.reach(len(places))
        order, units = cut_into(rows, unit_tokens=MAX_UNIT_TOKENS)
        for unit in units:
            chosen = places[order[unit.start : unit.stop]]
            pairs = [reader.pair(int(index.shard_numbers[place]), int(index.rows[place])) for place in chosen]
            written.add(cache.shards.path_of(cache.shards.write(pairs, recorded=recorded)))
            progress.reach(len(places) + unit.stop)
    return written


def _described(index: KeyIndex, reader: RowReader, places: npt.NDArray[np.int64]) -> SpooledPairs:
    """What decides where rows go: their keys, prompts and lengths."""
    keys, prompts, lengths = [], [], []
    for place in places.tolist():
        row = reader.pair(int(index.shard_numbers[place]), int(index.rows[place]))
        keys.append(row.key)
        prompts.append(prompt_hash_prefix(row.pair.prompt_ids))
        lengths.append(row.pair.shared_prefix_tokens)
    return SpooledPairs(
        spool_indices=np.arange(len(places)),
        keys=keys_array(keys),
        prompt_hashes=np.array(prompts, dtype=np.uint64),
        lengths=np.array(lengths, dtype=np.int64),
    )


def _move_mixtures(cache: ReferenceCache, outdated: list[Path]) -> list[str]:
    """Let mixtures that name an outdated shard name the others instead."""
    gone = {path.name for path in outdated}
    index = cache.shards.index_of(path for path in cache.shards.paths() if path.name not in gone)
    moved = []
    for name in cache.mixture_names():
        mixture = cache.read_mixture(name)
        if gone.isdisjoint(shard.file_name for shard in mixture.shards):
            continue
        MixtureContent.of(mixture).write(cache, name, key_index=index)
        moved.append(name)
    return moved

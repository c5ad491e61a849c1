"""Pairs at the two ends of a margin, decoded for the page of a report."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.example_key import keys_array
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.pair_stream import PairStream
from ...pipeline.cache.parquet_file import KEY_COLUMN
from ...pipeline.cache.scored_pair import ScoredPair
from ...pipeline.report.page_content import PairCard, PairGroup, PairPart, TextRun
from ...pipeline.report.run_record import RunRecord
from ...pipeline.report.run_table import figure
from ..addresses.location import is_address
from .shown_pair import ShownPair, ShownRun, decoder_of, shown_pair

PAIRS_AT_AN_END = 3
MAX_CHARACTERS = 1500
"""Of a prompt or answer on the page; the rest is counted."""
STREAM_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenMixture:
    """A mixture whose pairs are read and decoded."""

    cache: ReferenceCache
    mixture: Mixture
    stream: PairStream
    decode: Callable[[Sequence[int]], str]
    note: str

    def card(self, row: ScoredPair, margin: float) -> PairCard:
        """A pair with its text."""
        shown = shown_pair(row, self.decode)
        return PairCard(margin=figure(margin), key=row.key.hex(), parts=_parts(shown))


class OpenMixtures:
    """The mixtures that runs name, each opened once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str], OpenMixture] = {}

    def open(self, run: RunRecord, setting: str) -> OpenMixture:
        """The mixture that a run's ``mixture`` or ``eval_mixture`` means, in the cache it was trained from.

        Raises:
            DpoCacheError: It is gone, damaged, or of another reference by now.
        """
        path, name = run.settings.get("cache"), run.settings.get(setting)
        if not isinstance(path, str) or not isinstance(name, str):
            raise DpoCacheError("config.json does not name the cache")
        if is_address(path):
            raise DpoCacheError(f"the cache is at {path}, and a report does not fetch caches")
        if (path, name) not in self._opened:
            cache = ReferenceCache.open(Path(path))
            mixture = cache.read_mixture(name)
            decode, note = decoder_of(mixture)
            stream = PairStream(cache, mixture, cached_bytes=STREAM_BYTES)
            self._opened[path, name] = OpenMixture(
                cache=cache, mixture=mixture, stream=stream, decode=decode, note=note or ""
            )
        opened = self._opened[path, name]
        if opened.cache.reference_id != run.resolved.get("reference_id"):
            raise DpoCacheError(f"the cache in {path} now belongs to another reference")
        return opened

    def close(self) -> None:
        """Close all files."""
        for opened in self._opened.values():
            opened.stream.close()


class OutermostPairs:
    """The pairs of largest and smallest margin among all that are offered, a few at a time in memory."""

    def __init__(self, opened: OpenMixture) -> None:
        self._opened = opened
        self._largest: list[tuple[float, bytes, ScoredPair]] = []
        self._smallest: list[tuple[float, bytes, ScoredPair]] = []

    def offer(self, row: ScoredPair, margin: float) -> None:
        """Keep the pair if it is further out than one that is kept; the key decides between equals."""
        if any(row.key == key for _, key, _ in (*self._largest, *self._smallest)):
            return  # a pair that stands in the mixture more than once
        for kept, place in ((self._largest, margin), (self._smallest, -margin)):
            entry = (place, row.key, row)
            (heapq.heappush if len(kept) < PAIRS_AT_AN_END else heapq.heappushpop)(kept, entry)

    def group(self, heading: str, note: str) -> PairGroup:
        """Their cards, from the outermost inwards."""
        return PairGroup(
            heading=heading,
            note=" ".join([note, self._opened.note]).strip(),
            largest=[self._opened.card(row, place) for place, _, row in sorted(self._largest, reverse=True)],
            smallest=[self._opened.card(row, -place) for place, _, row in sorted(self._smallest, reverse=True)],
        )


def held_out_pairs(run: RunRecord, mixtures: OpenMixtures) -> PairGroup | None:
    """The held-out pairs that a run came to tell apart best and worst; None without their margins.

    Raises:
        DpoCacheError: The cache is gone or damaged, or holds other pairs by now.
    """
    if not run.eval_margins:
        return None
    opened = mixtures.open(run, "eval_mixture")
    few = PAIRS_AT_AN_END
    chosen = {pair.key: pair.margin for pair in (*run.eval_margins[:few], *run.eval_margins[-few:])}
    rows = _rows_of(opened.mixture, list(chosen))
    outermost = OutermostPairs(opened)
    for row in opened.stream.read(rows):
        outermost.offer(row, chosen[row.key.hex()])
    note = f"By the reward margin after the last evaluation, of {len(run.eval_margins):,} pairs."
    return outermost.group(run.name, note)


def _rows_of(mixture: Mixture, keys: list[str]) -> Any:
    column = mixture.table.column(KEY_COLUMN)
    try:
        wanted = keys_array([bytes.fromhex(key) for key in keys])
    except (ValueError, AssertionError) as error:
        raise DpoCacheError("eval_margins.jsonl holds an invalid key") from error
    rows = np.flatnonzero(np.isin(column, wanted))
    _, first = np.unique(column[rows], return_index=True)
    if len(first) < len(wanted):
        raise DpoCacheError(f"mixture {mixture.name} no longer holds the pairs that were evaluated")
    return rows[first]


def _parts(shown: ShownPair) -> list[PairPart]:
    facts = shown.facts()
    return [_part(name, facts[name], runs) for name, runs in shown.parts.items()]


def _part(name: str, facts: str, runs: Sequence[ShownRun]) -> PairPart:
    text, room = [], MAX_CHARACTERS
    for run in runs:
        if room > 0:
            text.append(TextRun(text=run.text[:room], scored=run.scored))
        room -= len(run.text)
    return PairPart(name=name, facts=facts, text=text, omitted=max(0, -room))

"""From datasets to training pairs: tokenise them, find what the cache holds already, spool what it does not.

Memory holds keys, hashes and lengths of the pairs (some 250 bytes each where none is known yet), never their
tokens.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DpoCacheError
from ...pipeline.cache.example_key import example_key, keys_array, prompt_hash_prefix
from ...pipeline.cache.key_index import KeyIndex
from ...pipeline.cache.mixture_rows import MixtureRows
from ...pipeline.cache.pair_spool import PairSpoolWriter
from ...pipeline.data.dataset_source import DatasetSource
from ...pipeline.data.pair_tokenizer import PairTokenizer
from ...pipeline.data.preference_format import unused_columns
from ...pipeline.data.token_pair import TokenPair
from ...pipeline.data.tokenization_settings import TokenizationSettings
from ...pipeline.data.tokenized_rows import TokenizedChunk, source_format, tokenize_rows
from ...pipeline.data.unusable_row import UnusableRow
from ..console.progress import Progress
from ..console.terminal import say
from .mixture_content import MixtureContent
from .pair_collection import CollectedPairs, SpooledPairs
from .row_counts import DROPPED, TRUNCATED, dropped_in_words

CHUNK_ROWS = 512
ROWS_WORTH_A_PROCESS = 4096
"""Below this, a tokenizing process of its own costs more to start than it saves."""
MAX_NAMED_FILES = 10
EXAMPLE_CHARACTERS = 400
"""Of a rendered example: enough for its beginning and its end, where special tokens are missing or stand twice."""


def collect_pairs(
    sources: Sequence[DatasetSource],
    settings: TokenizationSettings,
    *,
    known: KeyIndex | None,
    spool: Path,
    max_unusable_share: float,
    vocab_size: int | None = None,
    say_unusable: Callable[[str], None] | None = None,
) -> CollectedPairs:
    """Read and tokenise all sources.

    Args:
        sources: The opened datasets.
        settings: How rows become tokens.
        known: The keys the cache holds; None for an empty cache.
        spool: Where the tokens of unknown pairs are written.
        max_unusable_share: More unusable rows than this share end the build.
        vocab_size: How many tokens the model has embeddings for; None where that is not known.
        say_unusable: Told source, row and reason of each unusable row.

    Raises:
        DpoCacheError: Too many rows are unusable, by reason, or all of a dataset; or a row has a token that the model
            does not have.
    """
    tokenization = PairTokenizer(settings).description()
    if example := tokenization["rendered_example"]:
        say(f"the chat template renders a question and an answer as {_shortened(example)!r}")
    with PairSpoolWriter(spool) as writer:
        collector = _Collector(known, writer, vocab_size, say_unusable)
        for number, source in enumerate(sources):
            _read_source(collector, number, source, settings)
    collected = collector.collected([source.provenance() for source in sources], tokenization)
    _refuse_many_unusable(collected, max_unusable_share, are_listed=say_unusable is not None)
    return collected


def _read_source(collector: _Collector, number: int, source: DatasetSource, settings: TokenizationSettings) -> None:
    row_numbers, repeats = np.unique(source.picked_rows, return_counts=True)
    repeats_of = dict(zip(row_numbers.tolist(), repeats.tolist(), strict=True)) if repeats.max() > 1 else {}
    cores = len(os.sched_getaffinity(0))
    chunks = tokenize_rows(
        source,
        settings,
        num_processes=min(cores, 1 + len(row_numbers) // ROWS_WORTH_A_PROCESS),
        chunk_rows=CHUNK_ROWS,
    )
    done = 0
    with Progress(len(row_numbers), unit="row", title=f"tokenise {source.spec.path}") as progress:
        for line in _described(source):
            say(line)
        for chunk in chunks:
            collector.add(number, str(source.spec), chunk, repeats_of)
            done += len(chunk.source_rows)
            progress.reach(done)
    collector.refuse_dataset_without_pairs(number, str(source.spec))


def _described(source: DatasetSource) -> Iterator[str]:
    """How a source is read, and what of it is not."""
    preference_format = source_format(source)
    yield f"{source.spec}: {preference_format.description}"
    unused = unused_columns(source.column_names, preference_format)
    if unused:
        yield f"{source.spec}: columns that are not used: {', '.join(unused)}"
    if source.unread_files:
        more = ["…"] if len(source.unread_files) > MAX_NAMED_FILES else []
        named = ", ".join([*source.unread_files[:MAX_NAMED_FILES], *more])
        yield (
            f"warning: {source.spec}: in none of its splits, so not read: {named}; a folder is split by the names of "
            "its files, so name the files one by one, or rename them"
        )


def _shortened(text: str) -> str:
    """A long text without its middle."""
    half = EXAMPLE_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"


class _Collector:
    """Columns of the training pairs, grown chunk by chunk."""

    def __init__(
        self,
        known: KeyIndex | None,
        writer: PairSpoolWriter,
        vocab_size: int | None,
        say_unusable: Callable[[str], None] | None,
    ) -> None:
        self._known = known
        self._writer = writer
        self._vocab_size = vocab_size
        self._parts: list[MixtureRows] = []
        self._spooled: list[SpooledPairs] = []
        self._dropped: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._truncated: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._say_unusable = say_unusable
        self._num_rows: Counter[int] = Counter()

    def add(self, source: int, source_name: str, chunk: TokenizedChunk, repeats_of: dict[int, int]) -> None:
        """Take in one chunk of a source."""
        self._truncated[source] += chunk.truncated
        self._num_rows[source] += len(chunk.source_rows)
        pairs: list[TokenPair] = []
        source_rows: list[int] = []
        for row, result in zip(chunk.source_rows.tolist(), chunk.results, strict=True):
            if isinstance(result, UnusableRow):
                self._dropped[source][result.reason] += 1
                if self._say_unusable is not None:
                    self._say_unusable(f"{source_name} row {row}: {result}")
            else:
                self._refuse_unknown_token(result, f"{source_name} row {row}")
                pairs.append(result)
                source_rows.append(row)
        if not pairs:
            return
        columns = MixtureRows(
            example_keys=keys_array([example_key(pair) for pair in pairs]),
            prompt_hashes=np.array([prompt_hash_prefix(pair.prompt_ids) for pair in pairs], dtype=np.uint64),
            prompt_lengths=np.array([len(pair.prompt_ids) for pair in pairs], dtype=np.int32),
            chosen_lengths=np.array([len(pair.chosen_ids) for pair in pairs], dtype=np.int32),
            rejected_lengths=np.array([len(pair.rejected_ids) for pair in pairs], dtype=np.int32),
            sources=np.full(len(pairs), source, dtype=np.int32),
            source_rows=np.array(source_rows, dtype=np.int64),
        )
        self._spool_unknown(pairs, columns)
        if repeats_of:
            times = np.array([repeats_of[row] for row in source_rows])
            columns = columns.take(np.repeat(np.arange(len(pairs)), times))
        self._parts.append(columns)

    def refuse_dataset_without_pairs(self, source: int, source_name: str) -> None:
        """Refuse a dataset that the mixture would lack, however small its share of the rows is."""
        dropped = dict(sorted(self._dropped[source].items()))
        if sum(dropped.values()) == self._num_rows[source]:
            raise DpoCacheError(
                f"--dataset {source_name}: none of {self._num_rows[source]} rows makes a pair: "
                f"{dropped_in_words(dropped)}",
                next_step=_advice(dropped, are_listed=self._say_unusable is not None),
            )

    def collected(self, sources: list[dict[str, Any]], tokenization: dict[str, Any]) -> CollectedPairs:
        """Everything that was taken in."""
        records = [source | self._counts_of(number) for number, source in enumerate(sources)]
        rows = MixtureRows.concatenate(self._parts)
        return CollectedPairs(
            content=MixtureContent(rows=rows, tokenization=tokenization, sources=records, is_new=True),
            waiting=SpooledPairs.concatenate(self._spooled).distinct(),
            num_distinct=len(np.unique(rows.example_keys)),
            num_source_rows=self._num_rows.total(),
        )

    def _counts_of(self, source: int) -> dict[str, dict[str, int]]:
        """What became of a dataset's rows, for its record."""
        dropped, truncated = (dict(sorted(counts[source].items())) for counts in (self._dropped, self._truncated))
        return {DROPPED: dropped, **({TRUNCATED: truncated} if truncated else {})}

    def _refuse_unknown_token(self, pair: TokenPair, where: str) -> None:
        """Refuse a token without an embedding: on a GPU, looking it up ends the process without saying why."""
        largest = max(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise DpoCacheError(
                f"{where} has the token id {largest}, and the model has embeddings for {self._vocab_size} tokens",
                expected="the tokenizer that belongs to the model",
                next_step="name it with --tokenizer; if tokens were added to it, resize the model's embeddings "
                "(resize_token_embeddings) and save both together",
            )

    def _spool_unknown(self, pairs: Sequence[TokenPair], columns: MixtureRows) -> None:
        """Spool the pairs that the cache lacks.

        A pair that occurs twice in the data is spooled twice: to avoid that, all keys would have to stay in memory.
        """
        keys = columns.example_keys
        is_unknown = np.ones(len(keys), bool) if self._known is None else self._known.find(keys) < 0
        unknown = np.flatnonzero(is_unknown)
        self._spooled.append(
            SpooledPairs(
                spool_indices=self._writer.num_pairs + np.arange(len(unknown)),
                keys=keys[unknown],
                prompt_hashes=columns.prompt_hashes[unknown],
                lengths=np.array([pairs[index].shared_prefix_tokens for index in unknown.tolist()], dtype=np.int64),
            )
        )
        for index in unknown.tolist():
            self._writer.append(pairs[index])


def _refuse_many_unusable(collected: CollectedPairs, max_share: float, *, are_listed: bool) -> None:
    dropped = collected.content.dropped
    count = sum(dropped.values())
    if count > max_share * collected.num_source_rows:
        share = math.ceil(1000 * count / collected.num_source_rows) / 1000  # rounded down it would refuse again
        advice = _advice(dropped, are_listed=are_listed)
        raise DpoCacheError(
            f"{count} of {collected.num_source_rows} rows make no pair: {dropped_in_words(dropped)}",
            expected=f"at most a share of {max_share}",
            next_step=f"{advice}, or accept them with --max-unusable-share {share:g}",
        )


_REMEDIES = {
    "too-long": "raise --max-seq-length, or cut them with --truncation truncate-response-right",
    "prompt-too-long": "raise --max-seq-length",
    "response-too-long": "raise --max-seq-length",
    "several-messages": "score all that the assistant says from the first difference on with --mask response-turns",
}


def _advice(dropped: dict[str, int], *, are_listed: bool) -> str:
    """What helps with the reason that most of the unusable rows have in common, if any."""
    for reason, remedy in _REMEDIES.items():
        if 2 * dropped.get(reason, 0) >= sum(dropped.values()):
            return remedy
    return "mend the rows that are listed above" if are_listed else "look at the rows with --verbose"

"""A whole dataset through the tokenizer, in one process or in many, always in the same order.

Chunk number i belongs to worker i modulo the number of workers. Each worker walks its own chunks and sends each result
down its own pipe; the parent takes from the pipes in turn. So the order needs no sorting, nobody hands out work, and a
full pipe is all the back-pressure there is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .dataset_source import DatasetSource
from .pair_tokenizer import PairTokenizer
from .preference import Preference, read_preference
from .preference_format import MEDIA_COLUMNS, TELLING_COLUMNS, PreferenceFormat, detect_format, unused_columns
from .token_pair import TokenPair
from .tokenization_settings import TokenizationSettings
from .unusable_row import UnusableRow

_ROWS_TO_RECOGNISE = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedChunk:
    """Consecutive rows of a source, tokenized.

    Attributes:
        source_rows: Row numbers in the source, shape (rows of the chunk,).
        results: For each row its pair, or why it has none.
        truncated: Rows of which something was cut, by part, as :class:`PairTokenizer` counts them.
    """

    source_rows: npt.NDArray[np.int64]
    results: list[TokenPair | UnusableRow]
    truncated: Counter[str]


def source_format(source: DatasetSource) -> PreferenceFormat:
    """Recognise a source's format from its columns and its first picked rows.

    Raises:
        DpoCacheError: No format fits.
    """
    # Other columns may hold images or sounds, which would be decoded.
    first_rows = source.rows(source.distinct_rows[:_ROWS_TO_RECOGNISE], columns=TELLING_COLUMNS)
    return detect_format(source.column_names, first_rows)


def tokenize_rows(
    source: DatasetSource, settings: TokenizationSettings, *, num_processes: int, chunk_rows: int
) -> Generator[TokenizedChunk, None, None]:
    """Tokenize each distinct picked row of a source once, in the order in which they are picked.

    The chunks are the same for any number of processes. Workers end with the generator, and at most a chunk after
    their parent.

    Args:
        source: Open dataset.
        settings: How to make tokens.
        num_processes: Workers; with 1, the calling process does it itself.
        chunk_rows: Rows of a chunk.

    Raises:
        DpoCacheError: No format fits the columns, they hold images or sounds, a chat template was chosen for plain
            text, the tokenizer cannot be used, or a worker died.
    """
    preference_format = source_format(source)
    _refuse_media(source)
    if settings.chat_template is not None and not preference_format.uses_chat_template:
        raise DpoCacheError(
            f"--chat-template {settings.chat_template} has nothing to render in --dataset {source.spec}: "
            f"{preference_format.description}",
            next_step="leave the option out, or turn the columns into messages",
        )
    work = _Work(
        source=source,
        settings=settings,
        preference_format=preference_format,
        rows=source.distinct_rows,
        chunk_rows=chunk_rows,
    )
    num_workers = min(num_processes, work.num_chunks)
    if num_workers <= 1:
        yield from work.chunks(first=0, step=1)
        return
    with _Workers(work, num_workers) as workers:
        for number in range(work.num_chunks):
            yield workers.next_chunk(number % num_workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """Everything a worker needs, picklable."""

    source: DatasetSource
    settings: TokenizationSettings
    preference_format: PreferenceFormat
    rows: npt.NDArray[np.int64]
    chunk_rows: int

    @property
    def num_chunks(self) -> int:
        return -(-len(self.rows) // self.chunk_rows)

    def chunks(self, *, first: int, step: int) -> Iterator[TokenizedChunk]:
        tokenizer = PairTokenizer(self.settings)
        unused = unused_columns(self.source.column_names, self.preference_format)
        columns = [name for name in self.source.column_names if name not in unused]
        for number in range(first, self.num_chunks, step):
            rows = self.rows[number * self.chunk_rows : (number + 1) * self.chunk_rows]
            preferences = [_read(row, self.preference_format) for row in self.source.rows(rows, columns=columns)]
            truncated_before = Counter(tokenizer.truncated)
            yield TokenizedChunk(
                source_rows=rows,
                results=_tokenize(tokenizer, preferences),
                truncated=tokenizer.truncated - truncated_before,
            )


def _refuse_media(source: DatasetSource) -> None:
    """A pair about an image is another one without it."""
    for name in source.column_names:
        num_rows = source.rows_with(name) if name in MEDIA_COLUMNS else 0
        if num_rows:
            raise DpoCacheError(
                f"--dataset {source.spec} has something in its column {name}, in {num_rows} of its rows",
                expected="pairs of text alone: models of images and sounds are not supported",
                next_step=f"leave out these rows, or the column {name} if the texts make sense without it",
            )


def _read(row: dict[str, Any], preference_format: PreferenceFormat) -> Preference | UnusableRow:
    try:
        return read_preference(row, preference_format)
    except UnusableRow as unusable:
        return unusable


def _tokenize(tokenizer: PairTokenizer, preferences: list[Preference | UnusableRow]) -> list[TokenPair | UnusableRow]:
    readable = [preference for preference in preferences if isinstance(preference, Preference)]
    pairs = iter(tokenizer.tokenize_batch(readable))
    return [next(pairs) if isinstance(item, Preference) else item for item in preferences]


# ---- processes ----


class _Workers:
    """Worker processes and the pipes their chunks come through."""

    def __init__(self, work: _Work, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with threads in Rust can deadlock
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        try:
            with _deaf_to_interrupts():
                for first in range(num_workers):
                    receiving, sending = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_run_worker,
                        args=(work, first, num_workers, sending),
                        name=f"tokenizer-{first}",
                        daemon=True,
                    )
                    process.start()
                    sending.close()  # the worker's end lives in the worker alone, so its death ends the pipe
                    self._processes.append(process)
                    self._connections.append(receiving)
        except BaseException:
            self.close()
            raise

    def next_chunk(self, worker: int) -> TokenizedChunk:
        try:
            message = self._connections[worker].recv()
        except (EOFError, OSError):  # OSError where it died in the middle of a message
            process = self._processes[worker]
            process.join()
            raise DpoCacheError(
                f"a tokenizing process ended with exit code {process.exitcode}",
                expected="a chunk of tokens; -9 is mostly the system running out of memory",
                next_step="free some memory, then run the same command again",
            ) from None
        if isinstance(message, BaseException):
            raise message
        assert isinstance(message, TokenizedChunk)
        return message

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process, connection in zip(self._processes, self._connections, strict=False):
            process.join()
            connection.close()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole group, and the parent decides: a process started while this is held never hears of it,
    not even in its imports. The parent does, afterwards.
    """
    resource_tracker.ensure_running()  # started with the first process, it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_worker(work: _Work, first: int, step: int, connection: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    try:
        for chunk in work.chunks(first=first, step=step):
            connection.send(chunk)
    except BrokenPipeError:
        return  # the parent is gone: its end of the pipe exists nowhere else
    except DpoCacheError as error:
        connection.send(error)
    except Exception as error:
        error.add_note(f"in a tokenizing process:\n{traceback.format_exc()}")
        connection.send(error)

"""The same chunks from any number of processes, which end with the generator, with their parent, and by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer_factory import CHATML, marked, write_byte_tokenizer
from datasets import Dataset, Image
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.dataset_source import DatasetSource, open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.pipeline.data.preference_format import PreferenceFormat
from dpo_cache.pipeline.data.tokenization_settings import MaskChoice, TokenizationSettings
from dpo_cache.pipeline.data.tokenized_rows import TokenizedChunk, source_format, tokenize_rows
from dpo_cache.pipeline.data.unusable_row import UnusableRow

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared sample data is not there")


def open_rows(folder: Path, rows: list[dict[str, Any]], **options: str) -> DatasetSource:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_dataset(DatasetSpec(path=str(path), **options))


def transcripts(num_rows: int) -> list[dict[str, str]]:
    """Every fifth has two equal answers, every seventh answer is too long for a limit of 60."""
    return [
        {
            "chosen": f"\n\nHuman: {number}?\n\nAssistant: {'yes' * (20 if number % 7 == 0 else 1)}",
            "rejected": f"\n\nHuman: {number}?\n\nAssistant: {'yes' if number % 5 == 0 else 'no'}",
        }
        for number in range(num_rows)
    ]


@pytest.fixture
def settings(tmp_path: Path) -> TokenizationSettings:
    folder = write_byte_tokenizer(tmp_path / "tokenizer")
    return TokenizationSettings(tokenizer=folder, chat_template="tulu", max_seq_length=60)


def content(chunk: TokenizedChunk) -> list[tuple[int, str]]:
    return [
        (row, str(result) if isinstance(result, UnusableRow) else marked(result, "chosen") + marked(result, "rejected"))
        for row, result in zip(chunk.source_rows.tolist(), chunk.results, strict=True)
    ]


def num_children() -> int:
    return len(multiprocessing.active_children())


@pytest.mark.parametrize(("column", "none"), [("images", []), ("images", None), ("image", None)])
def test_pairs_about_images_are_refused_and_not_scored_as_if_they_had_none(
    tmp_path: Path, settings: TokenizationSettings, column: str, none: Any
) -> None:
    rows: list[dict[str, Any]] = [{**row, column: none} for row in transcripts(8)]
    assert list(tokenize_rows(open_rows(tmp_path, rows), settings, num_processes=1, chunk_rows=8))
    rows[7][column] = ["cat.png"] if column == "images" else "cat.png"
    with pytest.raises(DpoCacheError, match=f"something in its column {column}, in 1 of its rows"):
        list(tokenize_rows(open_rows(tmp_path, rows), settings, num_processes=1, chunk_rows=8))


def test_any_number_of_processes_yields_the_same_chunks(tmp_path: Path, settings: TokenizationSettings) -> None:
    source = open_rows(tmp_path, transcripts(23), amount="40")
    cutting = replace(settings, truncation="truncate-response-right")
    of_processes = [
        list(tokenize_rows(source, cutting, num_processes=num_processes, chunk_rows=5)) for num_processes in (1, 3)
    ]
    alone, shared_out = of_processes
    assert np.concatenate([chunk.source_rows for chunk in alone]).tolist() == list(range(23))
    assert [len(chunk.results) for chunk in alone] == [5, 5, 5, 5, 3]
    assert [content(chunk) for chunk in shared_out] == [content(chunk) for chunk in alone]
    assert [chunk.truncated for chunk in shared_out] == [chunk.truncated for chunk in alone]
    assert num_children() == 0


def test_chunks_count_their_own_truncations(tmp_path: Path, settings: TokenizationSettings) -> None:
    source = open_rows(tmp_path, transcripts(23))
    cutting = replace(settings, truncation="truncate-response-right")
    # Rows 0, 7, 14 and 21 have a chosen side beyond the limit.
    chunks = list(tokenize_rows(source, cutting, num_processes=1, chunk_rows=7))
    assert [chunk.truncated for chunk in chunks] == [Counter(chosen=1, either=1)] * 4
    chunks = list(tokenize_rows(source, settings, num_processes=1, chunk_rows=7))
    assert [chunk.truncated for chunk in chunks] == [Counter()] * 4
    reasons = Counter(result.reason for chunk in chunks for result in chunk.results if isinstance(result, UnusableRow))
    assert reasons == {"identical-responses": 4, "too-long": 4}


def test_only_picked_rows_are_tokenized_each_once(tmp_path: Path, settings: TokenizationSettings) -> None:
    source = open_rows(tmp_path, transcripts(7), amount="4")
    (chunk,) = tokenize_rows(source, settings, num_processes=2, chunk_rows=10)
    assert chunk.source_rows.tolist() == source.picked_rows.tolist() == [0, 1, 5, 2]


def test_the_format_is_that_of_the_source(tmp_path: Path) -> None:
    assert source_format(open_rows(tmp_path, transcripts(3))) is PreferenceFormat.TRANSCRIPT
    with pytest.raises(DpoCacheError, match="no preference format fits these columns: text"):
        source_format(open_rows(tmp_path, [{"text": "Hi"}]))


def test_a_chat_template_chosen_for_plain_text_is_refused(tmp_path: Path, settings: TokenizationSettings) -> None:
    source = open_rows(tmp_path, [{"prompt": "Hi:", "chosen": " Yes", "rejected": " No"}])
    with pytest.raises(DpoCacheError, match=r"--chat-template tulu has nothing to render in --dataset .*data.jsonl"):
        next(tokenize_rows(source, settings, num_processes=1, chunk_rows=5))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_of_ours_comes_through_whole(tmp_path: Path, num_processes: int) -> None:
    without_template = TokenizationSettings(tokenizer=write_byte_tokenizer(tmp_path / "tokenizer"))
    chunks = tokenize_rows(
        open_rows(tmp_path, transcripts(4)), without_template, num_processes=num_processes, chunk_rows=2
    )
    with pytest.raises(DpoCacheError, match="has no chat template") as error:
        list(chunks)
    assert error.value.next_step == "name one: --chat-template FILE_OR_NAME"
    assert num_children() == 0


def test_workers_end_when_nobody_takes_their_chunks(tmp_path: Path, settings: TokenizationSettings) -> None:
    chunks = tokenize_rows(open_rows(tmp_path, transcripts(3000)), settings, num_processes=2, chunk_rows=10)
    next(chunks)
    assert num_children() == 2
    chunks.close()
    assert num_children() == 0


def test_a_worker_that_is_killed_is_an_error_with_its_exit_code(tmp_path: Path, settings: TokenizationSettings) -> None:
    # More than fits into the pipes, so that no worker is done before it is killed.
    chunks = tokenize_rows(open_rows(tmp_path, transcripts(3000)), settings, num_processes=2, chunk_rows=10)
    next(chunks)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(DpoCacheError, match="a tokenizing process ended with exit code -9"):
        list(chunks)
    assert num_children() == 0


def test_workers_leave_ctrl_c_to_their_parent_from_their_first_moment(
    tmp_path: Path, settings: TokenizationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_and_interrupt(process: SpawnProcess) -> None:
        start(process)
        time.sleep(0.5)  # into its imports, where Python would turn the signal into a traceback
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)

    start = SpawnProcess.start
    monkeypatch.setattr(SpawnProcess, "start", start_and_interrupt)
    source = open_rows(tmp_path, transcripts(8))
    chunks = list(tokenize_rows(source, settings, num_processes=2, chunk_rows=4))
    assert sum(len(chunk.results) for chunk in chunks) == 8


PARENT = """
import multiprocessing, sys, time
from dpo_cache.pipeline.data.dataset_source import open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.pipeline.data.tokenization_settings import MaskChoice, TokenizationSettings
from dpo_cache.pipeline.data.tokenized_rows import tokenize_rows

if __name__ == "__main__":
    source = open_dataset(DatasetSpec(path=sys.argv[1]))
    settings = TokenizationSettings(tokenizer=sys.argv[2], chat_template="tulu")
    chunks = tokenize_rows(source, settings, num_processes=2, chunk_rows=10)
    next(chunks)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, settings: TokenizationSettings) -> None:
    open_rows(tmp_path, transcripts(3000))
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "data.jsonl"), settings.tokenizer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie, which nobody may be there to reap in a container."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@needs_shared_data
@pytest.mark.parametrize(
    ("name", "mask", "preference_format", "num_rows", "unusable"),
    [
        ("hh_harmless.jsonl.gz", "last-turn", "transcript", 1200, {"empty-response": 3, "several-messages": 2}),
        ("hh_harmless.jsonl.gz", "all-turns", "transcript", 1200, {"empty-response": 3}),
        ("alpaca_eval_pairs.jsonl.gz", "all-turns", "implicit-messages", 3220, {"identical-responses": 8}),
    ],
)
def test_real_rows_are_read_and_what_cannot_be_used_is_counted(
    tmp_path: Path, name: str, mask: MaskChoice, preference_format: str, num_rows: int, unusable: dict[str, int]
) -> None:
    folder = write_byte_tokenizer(tmp_path / "tokenizer", chat_template=CHATML)
    source = open_dataset(DatasetSpec(path=str(SHARED_DATA / name)))
    assert source_format(source) == preference_format
    settings = TokenizationSettings(tokenizer=folder, mask=mask)
    chunks = list(tokenize_rows(source, settings, num_processes=1, chunk_rows=500))
    results = [result for chunk in chunks for result in chunk.results]
    assert len(results) == num_rows
    assert Counter(result.reason for result in results if isinstance(result, UnusableRow)) == unusable


def test_a_column_that_is_not_used_is_not_decoded(tmp_path: Path) -> None:
    content = {"chosen": ["Hi: yes", "Hi: no"], "rejected": ["Hi: no", "Hi: yes"]}
    images = Dataset.from_dict({**content, "image": [{"bytes": b"no image", "path": None}] * 2})
    images.cast_column("image", Image()).to_parquet(tmp_path / "images.parquet")
    source = open_dataset(DatasetSpec(path=str(tmp_path / "images.parquet")))
    assert source_format(source) is PreferenceFormat.PLAIN_TEXT


def test_a_dataset_of_other_columns_alone_is_refused_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match="no preference format fits these columns: text, score"):
        source_format(open_rows(tmp_path, [{"text": "Hi", "score": 1}]))

"""Rows by number from every kind of file, and from the Hub."""

from __future__ import annotations

import errno
import gc
import gzip
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, load_dataset_builder
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data import dataset_source, source_rows
from dpo_cache.pipeline.data.dataset_source import DatasetSource, open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec

ROWS = [{"chosen": f"yes {number}", "rejected": "no", "score": number} for number in range(7)]


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sources put what they read, to be looked into."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = parquet(rows) if ".parquet" in path.name else json_lines(rows)
    if ".json." in f"{path.name}.":
        content = json.dumps(rows).encode()
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(compress[path.suffix](content) if path.suffix in compress else content)
    return path


def opened(path: Path | str, **options: str) -> DatasetSource:
    return open_dataset(DatasetSpec(path=str(path), **options))


def all_rows(source: DatasetSource) -> list[dict[str, Any]]:
    return list(source.rows(np.arange(source.num_rows)))


# ---- files ----


@pytest.mark.parametrize(
    "name",
    [
        "data.jsonl",
        "data.json",
        "data.parquet",
        "data.jsonl.gz",
        "data.json.gz",
        "data.parquet.gz",
        "data.jsonl.zst",
        "data.json.zst",
        "data.parquet.zst",
    ],
)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    source = opened(write(tmp_path / name))
    assert source.num_rows == 7
    assert source.column_names == ["chosen", "rejected", "score"]
    assert all_rows(source) == ROWS


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_rows_come_in_the_order_asked_for_with_the_columns_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(source_rows, "READ_ROWS", 2)
    source = opened(write(tmp_path / name))
    rows = list(source.rows(np.array([5, 0, 5, 3, 6]), columns=["score", "tools"]))
    assert rows == [{"score": number} for number in (5, 0, 5, 3, 6)]


def test_nested_messages_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"chosen": [{"role": "user", "content": "Hi"}], "rejected": [{"role": "user", "content": "Hé\n"}]}] * 2
    assert all_rows(opened(write(tmp_path / "data.jsonl", rows))) == rows


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "train-00000.jsonl", ROWS[:2])
    write(tmp_path / "folder" / "train-00001.jsonl", ROWS[2:4])
    write(tmp_path / "folder" / "test.jsonl", ROWS[4:])
    assert all_rows(opened(tmp_path / "folder")) == ROWS[:4]
    test = opened(tmp_path / "folder", split="test")
    assert all_rows(test) == ROWS[4:]
    assert [file["name"] for file in test.provenance()["files"]] == ["test.jsonl"]
    assert all_rows(opened(tmp_path / "folder", split="train[1:3]")) == ROWS[1:3]


def test_splits_that_are_joined_are_recorded_with_the_files_of_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder" / "train.jsonl", ROWS[:4]).parent
    write(folder / "test.jsonl", ROWS[4:])
    for split, rows in (("train+test", ROWS), ("train[:2]+test[:1]", [*ROWS[:2], ROWS[4]])):
        source = opened(folder, split=split)
        assert all_rows(source) == rows
        assert [file["name"] for file in source.provenance()["files"]] == ["train.jsonl", "test.jsonl"]
    with pytest.raises(DpoCacheError, match="there is no split train\\+dev"):
        opened(folder, split="train+dev")


@pytest.mark.parametrize(
    ("names", "read", "unread"),
    [
        (["hh.jsonl", "alpaca_eval.jsonl"], ["alpaca_eval.jsonl"], ["hh.jsonl"]),  # "eval" means a test split
        (["train-0.jsonl", "test.jsonl", "more/extra.json.gz"], ["train-0.jsonl"], ["more/extra.json.gz"]),
        (["one.jsonl", "two.jsonl", "three.parquet"], ["one.jsonl", "two.jsonl"], ["three.parquet"]),
        (["one.jsonl", "two.jsonl", "config.json", ".cache/old.jsonl"], ["one.jsonl", "two.jsonl"], []),
    ],
)
def test_data_files_of_a_folder_that_are_in_no_split_are_told(
    tmp_path: Path, names: list[str], read: list[str], unread: list[str]
) -> None:
    for name in names:
        write(tmp_path / "folder" / name)
    source = opened(tmp_path / "folder")
    assert [file["name"] for file in source.provenance()["files"]] == read
    assert source.unread_files == unread


def test_the_files_of_another_config_are_not_missed(tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("default", "other"))
    for name in ("default", "other"):
        write(tmp_path / "folder" / f"{name}.jsonl")
    (tmp_path / "folder" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert opened(tmp_path / "folder").unread_files == []


def test_a_folder_without_a_train_split_wants_a_name(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "dev.jsonl")
    write(tmp_path / "folder" / "test.jsonl")
    with pytest.raises(DpoCacheError, match="has no split `train`") as error:
        opened(tmp_path / "folder")
    assert error.value.next_step == f"--dataset {tmp_path}/folder,split=validation"
    for name in ("test_prefs", "train_prefs"):  # as UltraFeedback has them
        write(tmp_path / "named" / "data" / f"{name}-00000-of-00001.jsonl")
    with pytest.raises(DpoCacheError, match="has no split `train`") as error:
        opened(tmp_path / "named")
    assert error.value.next_step == f"--dataset {tmp_path}/named,split=train_prefs"


def test_a_dataset_saved_to_disk_is_read_whole(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert all_rows(source) == ROWS
    assert source.unread_files == []


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_file_overwritten_between_two_openings_is_read_anew(tmp_path: Path, in_folder: bool) -> None:
    path = write(tmp_path / "folder" / "data.jsonl", [{"chosen": "a"}])
    name = path.parent if in_folder else path
    status = path.stat()
    assert all_rows(opened(name)) == [{"chosen": "a"}]
    write(path, [{"chosen": "b"}])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert all_rows(opened(name)) == [{"chosen": "b"}]


def test_provenance_digests_the_bytes_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl.gz")
    assert opened(path, amount="0.5").provenance() == {
        "path": str(path),
        "split": "train",
        "config": None,
        "revision": None,
        "amount": "0.5",
        "files": [
            {
                "name": "data.jsonl.gz",
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "num_bytes": path.stat().st_size,
            }
        ],
        "num_rows": 7,
        "picked_rows": 3,
    }


def test_what_was_read_goes_with_the_source(tmp_path: Path, temporary_folder: Path) -> None:
    source = opened(write(tmp_path / "data.jsonl"))
    assert list(temporary_folder.iterdir())
    del source
    gc.collect()
    assert not list(temporary_folder.iterdir())


def test_a_copy_for_another_process_reads_the_same_and_removes_nothing(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "data.jsonl"), amount="9")
    copy = pickle.loads(pickle.dumps(source))
    assert all_rows(copy) == ROWS
    assert copy.picked_rows.tolist() == source.picked_rows.tolist()
    del copy
    gc.collect()
    assert all_rows(source) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"chosen": ', "cannot be read"),
        ("data.parquet", b"PAR1", "cannot be read"),
        ("data.parquet.gz", gzip.compress(parquet(ROWS))[:-20], "cannot be read: Compressed file ended before the end"),
        ("data.parquet.gz", b"PAR1", "cannot be read: Not a gzipped file"),
        ("data.parquet.zst", b"PAR1", "cannot be read: zstd decompress error"),
        ("data.jsonl", b"", "has no rows"),
        ("data.csv", b"chosen,rejected\n", "files ending in .csv are not read"),
        ("data.gz", b"", "files ending in .gz are not read"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_ours(
    tmp_path: Path, temporary_folder: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DpoCacheError, match=message):
        opened(tmp_path / name)
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet.gz"])
def test_a_full_disk_is_told_with_the_folder_that_needs_room(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    with pytest.raises(DpoCacheError, match="No space left on device") as told:
        opened(write(tmp_path / name))
    assert told.value.expected == f"room in {temporary_folder} for its rows, which are read through a copy"
    assert told.value.next_step == "free some there, or set TMPDIR to a folder on another disk"
    monkeypatch.setattr(dataset_source, "load_dataset_builder", full)
    with pytest.raises(DpoCacheError, match="No space left on device") as told:
        opened("org/name")
    assert str(told.value.next_step).startswith("free some there, or set HF_DATASETS_CACHE to")


# ---- JSON as it was written ----

MIXED: list[dict[str, Any]] = [
    {"chosen": text, "meta": {"score": 2.53, str(number): 1e-12}}
    for number, text in enumerate(
        ["plain", "42", " 007", "null", '"Yes"', '{"a": 1}', 'a/b "c"\n\u00e9\u2028', "2021-01-02", "2021-01-02"]
    )
]
"""What a reader that guesses a type for each column changes: texts, small numbers, keys."""
ANYTHING: list[dict[str, Any]] = [
    *MIXED,
    {"chosen": [{"type": "text", "text": "Yes"}], "more": 7},
    {"chosen": 7},
    {"chosen": {"role": "r"}},
]


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which null stands for what others have."""
    return [dict.fromkeys(("chosen", "meta", "more")) | row for row in rows]


@pytest.mark.parametrize("name", ["jsonl", "json"])
def test_values_come_back_as_written_whatever_other_rows_and_files_hold(tmp_path: Path, name: str) -> None:
    write(tmp_path / "folder" / f"a.{name}", MIXED)
    assert all_rows(opened(tmp_path / "folder")) == MIXED
    write(tmp_path / "folder" / f"b.{name}", ANYTHING)
    source = opened(tmp_path / "folder")
    assert all_rows(source) == whole([*MIXED, *ANYTHING])
    assert source.column_names == ["chosen", "meta", "more"]


def test_rows_that_hold_something_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"images": images, "chosen": None} for images in ([], None, ["a.png"])]
    rows[1]["chosen"] = "yes"
    for name in ("data.jsonl", "data.json", "data.parquet"):
        source = opened(write(tmp_path / name, rows))
        assert (source.rows_with("images"), source.rows_with("chosen")) == (1, 1)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS[:3]) + "\n" + json.dumps(ROWS[3:]),
        "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n",
        "\n" + json_lines(ROWS).decode(),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        json_lines(ROWS[:3]).decode() + json.dumps(ROWS[3:], indent=1),
        json_lines(ROWS).decode().replace("\n", "\r\n"),
        "\ufeff" + json_lines(ROWS).decode(),
        "\ufeff" + json.dumps(ROWS),
        "\n[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    ],
)
def test_objects_may_lie_in_arrays_or_over_lines_and_slices_are_of_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content, encoding="utf-8", newline="")
    assert all_rows(opened(tmp_path / "data.json")) == ROWS
    assert all_rows(opened(tmp_path / "data.json", split="train[1:3]")) == ROWS[1:3]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (json_lines(ROWS).decode() + '{"chosen": "a" "b"}\n', "line 8 is not JSON: Expecting ',' delimiter"),
        (json_lines(ROWS).decode() + '{"chosen": \n', "line 8 is not JSON: Expecting value"),
        (json_lines(ROWS).decode() + '"text"\n', "line 8 holds a str, not an object"),
        ("\n" + json_lines(ROWS).decode() + "null\n", "line 9 holds a NoneType, not an object"),
        ('["yes", "no"]', "an array holds something else than objects"),
        ('[{"a": 1}, {"b": 2}', "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
        ('{"a": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_row_is_named_by_its_line(tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DpoCacheError, match=f"cannot be read: {found}"):
        opened(tmp_path / "data.jsonl")


def test_a_row_that_is_wrong_in_its_middle_is_refused_before_all_that_follow_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_rows, "_rows_of_values", None)
    (tmp_path / "data.jsonl").write_text('{"chosen": "a" "b"}\n' + json_lines(ROWS).decode())
    with pytest.raises(DpoCacheError, match="line 1 is not JSON: Expecting ',' delimiter"):
        opened(tmp_path / "data.jsonl")


def test_rows_that_a_folder_says_are_a_field_of_its_files_are_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/data.json").write_text(json.dumps({"version": 1, "rows": ROWS}))
    configs = "configs:\n- config_name: default\n  data_files: data.json\n  field: rows\n"
    (tmp_path / "folder/README.md").write_text(f"---\n{configs}---\n")
    assert all_rows(opened(tmp_path / "folder")) == ROWS


@pytest.mark.parametrize("content", ["\n", " \n\n", "\ufeff"])
def test_blank_lines_are_no_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DpoCacheError, match="has no rows"):
        opened(tmp_path / "data.jsonl")


def test_parquet_files_that_differ_are_to_be_named_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "a.parquet", [{"chosen": "yes"}])
    write(tmp_path / "folder" / "b.parquet", [{"chosen": ["yes"]}])
    with pytest.raises(DpoCacheError, match="its files have different columns, keys or types"):
        opened(tmp_path / "folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "main"}, "a local dataset has no revision"),
        ({"config": "default"}, "a single file has no config"),
        ({"split": "test"}, "there is no split test"),
    ],
)
def test_options_that_a_file_does_not_have_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        opened(write(tmp_path / "data.jsonl"), **options)


def test_text_that_is_not_utf8_is_an_error_of_ours(tmp_path: Path) -> None:
    latin = "caf\u00e9".encode("latin-1")
    (tmp_path / "data.jsonl").write_bytes(b'{"chosen": "' + latin + b'"}')
    pq.write_table(pa.table({"chosen": pa.array([latin]).view(pa.string())}), tmp_path / "data.parquet")
    for name in ("data.jsonl", "data.parquet"):
        with pytest.raises(DpoCacheError, match="holds text that is not UTF-8"):
            all_rows(opened(tmp_path / name))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match="no such file") as missing:
        opened(tmp_path / "missing.jsonl.gz")
    assert missing.value.next_step is None  # `ls` is something that everybody knows


@pytest.mark.parametrize("name", ["pairs[1].jsonl", "pairs*.jsonl", "run[2]/train.jsonl", "a::b/train.jsonl"])
def test_a_file_whose_name_could_be_a_pattern_means_itself(tmp_path: Path, name: str) -> None:
    rows = '{"chosen": "Hi: yes", "rejected": "Hi: no"}\n'
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(rows)
    (tmp_path / "pairs1.jsonl").write_text(rows * 2)
    source = open_dataset(DatasetSpec(path=str(tmp_path / name)))
    assert source.num_rows == 1
    assert [record["name"] for record in source.provenance()["files"]] == [(tmp_path / name).name]


def test_a_folder_whose_name_could_be_a_pattern_is_refused(tmp_path: Path) -> None:
    for name in ("run[2]", "a*b", "a::b"):
        (tmp_path / name).mkdir()
        with pytest.raises(DpoCacheError, match="a folder whose path has") as refused:
            open_dataset(DatasetSpec(path=str(tmp_path / name)))
        assert "rename it" in str(refused.value.next_step)


# ---- hub ----


def test_a_hub_dataset_is_recorded_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset_builder(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train_prefs": [], "test_prefs": []}),
            hash="0123abc",
            download_and_prepare=lambda: None,
            as_dataset=lambda split: Dataset.from_list(ROWS),
        )

    monkeypatch.setattr(dataset_source, "load_dataset_builder", load_dataset_builder)
    spec = DatasetSpec(path="org/name", config="main", revision="v1", split="train_prefs")
    source = open_dataset(spec)
    assert asked == [("org/name", {"name": "main", "revision": "v1"})]
    assert source.provenance()["commit"] == "0123abc"
    assert all_rows(source) == ROWS
    with pytest.raises(DpoCacheError, match="has no split `train`"):
        open_dataset(DatasetSpec(path="org/name"))


def test_json_files_on_the_hub_come_back_as_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder" / "train.json", MIXED)
    on_hub = load_dataset_builder(str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(dataset_source, "load_dataset_builder", lambda *_, **__: on_hub)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert all_rows(opened("org/name", split="train[:3]")) == MIXED[:3]


def test_a_dataset_that_is_neither_here_nor_on_the_hub_is_named() -> None:
    with pytest.raises(DpoCacheError, match="org/not-there cannot be read") as missing:
        open_dataset(DatasetSpec(path="org/not-there"))
    assert "hf auth login" in str(missing.value.next_step)


def test_repeated_rows_are_picked_as_often_as_asked_and_distinct_once(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "data.jsonl"), amount="16")
    assert source.picked_rows.tolist() == [*range(7), *range(7), 0, 1]
    assert source.distinct_rows.tolist() == list(range(7))
    assert source.provenance()["picked_rows"] == 16


def test_distinct_rows_keep_the_order_in_which_they_are_picked(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "data.jsonl"), amount="4")
    assert source.distinct_rows.tolist() == source.picked_rows.tolist() == [0, 1, 5, 2]

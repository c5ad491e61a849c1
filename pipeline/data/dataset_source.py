"""Where preference rows come from: local files, folders and Hub datasets."""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from datasets import Dataset, load_dataset_builder
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import FILES_TO_IGNORE
from datasets.packaged_modules.json.json import Json as JsonFiles
from datasets.packaged_modules.text.text import Text as TextFiles

from ...errors import DpoCacheError, first_line
from .dataset_spec import DatasetSpec
from .named_path import named_path
from .source_rows import LINE, JsonRows, NoJsonRowsError, SourceRows, TableRows, one_object_a_line

_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DatasetSource:
    """An open dataset: its rows by number, and which of them were asked for.

    Local files are read through a temporary folder of Arrow files that goes with this object; memory does not grow
    with the dataset, except for JSON files that are one array. A copy sent to another process reads the same files and
    removes nothing.

    Attributes:
        spec: What was asked for.
        num_rows: Rows there are, before the amount.
        picked_rows: Row numbers in order, repeats included, shape (rows picked,).
        unread_files: Names of the data files of a folder that are in none of its splits.
    """

    def __init__(
        self, spec: DatasetSpec, rows: SourceRows, provenance: dict[str, Any], *, unread_files: Sequence[str] = ()
    ) -> None:
        self.spec = spec
        self.unread_files = unread_files
        self.num_rows = rows.num_rows
        self.picked_rows = spec.pick_rows(self.num_rows)
        self._rows = rows
        self._provenance = provenance

    @property
    def column_names(self) -> list[str]:
        """The dataset's columns."""
        return list(self._rows.column_names)

    @property
    def distinct_rows(self) -> npt.NDArray[np.int64]:
        """The picked rows without their repeats, in the order in which they first come."""
        rows, first_places = np.unique(self.picked_rows, return_index=True)
        return rows[np.argsort(first_places)]

    def rows_with(self, column: str) -> int:
        """How many rows hold something in a column: no null and no empty list. Nothing is decoded."""
        return self._rows.rows_with(column)

    def rows(
        self, row_numbers: npt.NDArray[np.int64], *, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows by number, in the order given.

        Args:
            row_numbers: Row numbers, shape (rows wanted,).
            columns: Read only these; None for all. Names that the dataset lacks are left out.

        Raises:
            DpoCacheError: A text is not UTF-8.
        """
        names = [name for name in self.column_names if columns is None or name in columns]
        try:
            yield from self._rows.read(row_numbers, names)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.spec, error) from error

    def provenance(self) -> dict[str, Any]:
        """What a mixture records of this source: spec, commit or digests of its files, counts of rows."""
        return {**self._provenance, "num_rows": self.num_rows, "picked_rows": len(self.picked_rows)}


def open_dataset(spec: DatasetSpec) -> DatasetSource:
    """Open a dataset.

    Raises:
        DpoCacheError: It does not exist, cannot be read, has no such split, or has no rows.
    """
    path = named_path(spec.path)
    if not path.exists() and any(suffix in _FILE_TYPES for suffix in path.suffixes):
        raise DpoCacheError(f"--dataset {spec}: no such file")
    folder = Path(tempfile.mkdtemp(prefix="dpo-cache-dataset-"))
    try:
        source = _open_local(spec, path, folder) if path.exists() else _open_hub(spec, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(source, _remove_folder, folder, os.getpid())
    return source


def _open_local(spec: DatasetSpec, path: Path, folder: Path) -> DatasetSource:
    if spec.revision is not None:
        raise DpoCacheError(f"--dataset {spec}: a local dataset has no revision", next_step="leave revision= out")
    builder = _local_builder(spec, path, folder)
    split = _choose_split(spec, builder)
    files = _split_files(builder, split) if path.is_dir() else [path]
    before = [_age(file) for file in files]
    # `datasets` keys its cache by path and age of a file: a folder of our own is never stale.
    rows = _read(spec, builder, split, folder, cache=folder)
    records = [_file_record(file, relative_to=path) for file in files]
    if before != [_age(file) for file in files]:
        raise DpoCacheError(f"--dataset {spec}: its files changed while they were read")
    unread = _unread_files(path.resolve(), builder) if path.is_dir() else []
    return DatasetSource(spec, rows, {**_spec_record(spec, split), "files": records}, unread_files=unread)


def _open_hub(spec: DatasetSpec, folder: Path) -> DatasetSource:
    builder = _builder(spec, spec.path, name=spec.config, revision=spec.revision)
    split = _choose_split(spec, builder)
    rows = _read(spec, builder, split, folder, cache=None)
    # A Hub dataset's builder goes by the commit that its files are taken from.
    return DatasetSource(spec, rows, {**_spec_record(spec, split), "commit": builder.hash})


# ---- through the datasets library ----


def _local_builder(spec: DatasetSpec, path: Path, folder: Path) -> Any:
    if path.is_dir():
        _refuse_pattern(spec, path.resolve())
        return _builder(spec, str(path.resolve()), name=spec.config, cache_dir=str(folder))
    if spec.config is not None:
        raise DpoCacheError(f"--dataset {spec}: a single file has no config", next_step="leave config= out")
    file_type = _file_type(path)
    if file_type is None:
        raise DpoCacheError(
            f"--dataset {spec}: files ending in {path.suffix or 'nothing'} are not read",
            expected=f"{', '.join(_FILE_TYPES)}, or one of these with .gz or .zst",
        )
    if not path.stat().st_size:
        raise _empty(spec)
    if file_type == "parquet" and path.suffix != ".parquet":
        plain = _decompressed(spec, path, folder)
    else:
        plain = folder / f"rows{path.suffix}"  # a name that is no pattern: pairs[1].jsonl would mean pairs1.jsonl
        plain.symlink_to(path.resolve())
    return _builder(spec, file_type, data_files={"train": [str(plain)]}, cache_dir=str(folder))


def _file_type(path: PurePath) -> str | None:
    """What the library calls a file of this name; None for one that is not read."""
    if path.suffix not in (*_FILE_TYPES, ".gz", ".zst"):
        return None
    return next((_FILE_TYPES[suffix] for suffix in path.suffixes if suffix in _FILE_TYPES), None)


def _refuse_pattern(spec: DatasetSpec, folder: Path) -> None:
    """The library takes the whole path of a folder, links resolved, for a pattern: it would read others, or none."""
    if glob.has_magic(str(folder)) or "::" in str(folder):
        raise DpoCacheError(
            f"--dataset {spec}: a folder whose path has *, ?, [ or :: in it cannot be read",
            next_step="rename it, or name its files one by one",
        )


def _decompressed(spec: DatasetSpec, path: Path, folder: Path) -> Path:
    """Parquet is read from its end, so a compressed one has to be written out; JSON lines are read as a stream."""
    target = folder / "decompressed.parquet"
    open_compressed = gzip.open if path.suffix == ".gz" else zstandard.open
    try:
        with open_compressed(path, "rb") as compressed, target.open("wb") as plain:
            shutil.copyfileobj(compressed, plain)
    except Exception as error:  # each of the two has kinds of its own
        raise _unreadable(spec, error) from error
    return target


def _builder(spec: DatasetSpec, *arguments: Any, **keywords: Any) -> Any:
    try:
        return load_dataset_builder(*arguments, **keywords)
    except Exception as error:
        raise _unreadable(spec, error) from error


def _read(spec: DatasetSpec, builder: Any, split: str, folder: Path, *, cache: Path | None) -> SourceRows:
    """The rows of a split.

    Args:
        spec: For messages.
        builder: Of the library.
        split: May be slices of several.
        folder: For what is written while they are read; it stays as long as they do.
        cache: Where the library keeps its copy; None for its own place.
    """
    try:
        if isinstance(builder, JsonFiles) and builder.config.field is None:
            rows: SourceRows = _json_rows(builder, split, folder, cache)
        else:
            builder.download_and_prepare()
            rows = TableRows(builder.as_dataset(split=split))
    except Exception as error:
        raise _unreadable(spec, error) from error
    if rows.num_rows == 0:
        raise _empty(spec)
    return rows


def _json_rows(builder: JsonFiles, split: str, folder: Path, cache: Path | None) -> JsonRows:
    lines = _lines(builder.config.data_files, cache, hash=builder.hash, base_path=builder.base_path)
    try:
        if "[" in split:  # lines of an array can be cut as well, and would be something else
            for name in _base_splits(split):
                JsonRows(lines.as_dataset(split=name))
        return JsonRows(lines.as_dataset(split=split))
    except NoJsonRowsError:
        return JsonRows(_with_one_object_a_line(lines, split, folder))


def _with_one_object_a_line(lines: TextFiles, split: str, folder: Path) -> Dataset:
    """A copy of the lines in which each is a row."""
    files: dict[str, list[str]] = {}
    for name in _base_splits(split):
        path = folder / f"{name}.lines"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{row}\n" for row in one_object_a_line(lines.as_dataset(split=name)))
        if path.stat().st_size == 0:  # which the library cannot read
            return Dataset.from_dict({LINE: []})
        files[name] = [str(path)]
    return _lines(files, folder).as_dataset(split=split)


def _lines(data_files: Any, cache: Path | None, **keywords: Any) -> TextFiles:
    lines = TextFiles(data_files=data_files, cache_dir=cache and str(cache), **keywords)
    lines.download_and_prepare()
    return lines


def _empty(spec: DatasetSpec) -> DpoCacheError:
    return DpoCacheError(f"--dataset {spec} has no rows", expected="preference pairs, one in a row")


def _unreadable(spec: DatasetSpec, error: Exception) -> DpoCacheError:
    """What `datasets` raises is of many classes; the innermost cause says most."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, NoJsonRowsError):
        cause = cause.__cause__
    if isinstance(cause, StopIteration):  # what an empty file leaves of its first line
        return _empty(spec)
    is_local = named_path(spec.path).exists()
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(spec, cause, is_local=is_local)
    if isinstance(cause, UnicodeDecodeError):
        return _not_utf8(spec, cause)
    if str(cause).startswith("Couldn't cast"):
        return DpoCacheError(
            f"--dataset {spec} cannot be read: its files have different columns, keys or types",
            expected="the same in all Parquet files of a folder",
            next_step="name its files one by one, each with a --dataset of its own",
        )
    return DpoCacheError(
        f"--dataset {spec} cannot be read: {first_line(cause)}",
        expected=f"a file ({', '.join(_FILE_TYPES)}, also .gz, .zst), a folder of those, or a Hub dataset",
        next_step=None
        if is_local
        else "check the spelling and the network; for a gated dataset run `hf auth login` first",
    )


def _not_utf8(spec: DatasetSpec, error: UnicodeDecodeError) -> DpoCacheError:
    return DpoCacheError(
        f"--dataset {spec} holds text that is not UTF-8: {error}",
        next_step="find its encoding and convert it: iconv -f latin1 -t utf8 FILE > NEW_FILE",
    )


def _no_room(spec: DatasetSpec, error: OSError, *, is_local: bool) -> DpoCacheError:
    place, variable = (tempfile.gettempdir(), "TMPDIR") if is_local else (HF_DATASETS_CACHE, "HF_DATASETS_CACHE")
    return DpoCacheError(
        f"--dataset {spec} cannot be read: {first_line(error)}",
        expected=f"room in {place} for its rows, which are read through a copy",
        next_step=f"free some there, or set {variable} to a folder on another disk",
    )


def _choose_split(spec: DatasetSpec, builder: Any) -> str:
    splits = [str(split) for split in builder.config.data_files or builder.info.splits or ()]
    if spec.split is not None:
        if not set(_base_splits(spec.split)) <= set(splits):
            raise DpoCacheError(
                f"--dataset {spec}: there is no split {spec.split}", expected=f"one of {', '.join(splits)}"
            )
        return spec.split
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    # `train_prefs` or `train_sft` rather than `test_prefs`: a command that is copied must not train on test data.
    likely = next((name for name in splits if name.startswith("train")), splits[0] if splits else "NAME")
    raise DpoCacheError(
        f"--dataset {spec} has no split `train`",
        expected=f"one of {', '.join(splits)}",
        next_step=f"--dataset {spec},split={likely}",
    )


def _base_splits(split: str) -> list[str]:
    """``train[:10%]+test`` takes rows of ``train`` and ``test``."""
    return list(dict.fromkeys(part.partition("[")[0] for part in split.split("+")))


def _split_files(builder: Any, split: str) -> list[Path]:
    return [Path(file) for name in _base_splits(split) for file in builder.config.data_files[name]]


def _unread_files(folder: Path, builder: Any) -> list[str]:
    """Data files of a folder that are in none of its splits, by their names in it.

    Of files of several kinds the library reads the most frequent one, and as soon as one is named after a split
    (``alpaca_eval.jsonl`` is a test split), only those that are.
    """
    if len(builder.builder_configs) > 1:  # the folder's README lists the files of each
        return []
    in_splits = {Path(file) for files in builder.config.data_files.values() for file in files}
    others = (
        file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file() and file not in in_splits
    )
    return [
        str(file)
        for file in others
        if _file_type(file) is not None
        and file.name not in (*FILES_TO_IGNORE, "state.json")  # the last is written by `save_to_disk`
        and not any(part.startswith((".", "__")) for part in file.parts)
    ]


# ---- what was read ----


def _spec_record(spec: DatasetSpec, split: str) -> dict[str, Any]:
    return {
        "path": spec.path,
        "split": split,
        "config": spec.config,
        "revision": spec.revision,
        "amount": spec.amount,
    }


def _file_record(file: Path, *, relative_to: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    name = str(file.relative_to(relative_to.resolve())) if relative_to.is_dir() else file.name
    return {"name": name, "sha256": digest, "num_bytes": file.stat().st_size}


def _age(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _remove_folder(folder: Path, owner: int) -> None:
    """A forked child has a copy of the source, and must not take the files from its parent."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)

"""A file of a cache is absent or whole at every moment, whatever the operating system does."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.cache.durable_file import (
    adopt_durably,
    make_folder_durably,
    remove_durably,
    settle_tree,
    write_durably,
)
from recorded_operations import RecordedOperations


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "shards").mkdir()
    (tmp_path / "tmp").mkdir()
    return tmp_path / "shards", tmp_path / "tmp"


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, tmp = folders
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    write_durably(shards / "a", [b"one", b"three"], temporary_folder=tmp)
    assert recorder.calls == ["create", "write 3", "write 5", "sync", "rename to shards/a", "sync_folder shards"]
    assert (shards / "a").read_bytes() == b"onethree"
    assert list(tmp.iterdir()) == []


def test_a_file_that_others_wrote_is_synced_before_it_gets_its_name(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, tmp = folders
    (tmp / "fetched").write_bytes(b"rows")
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    adopt_durably(tmp / "fetched", shards / "a")
    assert recorder.calls == ["open fetched", "sync", "rename to shards/a", "sync_folder shards"]


def test_of_a_folder_that_others_wrote_every_file_and_folder_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step/engine").mkdir(parents=True)
    for name in ("engine/weights", "state"):
        (tmp_path / "step" / name).write_bytes(b"whole")
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    assert settle_tree(tmp_path / "step") == [tmp_path / "step/engine/weights", tmp_path / "step/state"]
    assert recorder.calls == ["sync_folder engine", "open weights", "sync", "open state", "sync", "sync_folder step"]


@pytest.mark.parametrize("call", range(5))
def test_whichever_call_fails_the_old_file_or_the_new_one_is_there_whole_and_nothing_is_left_over(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    shards, tmp = folders
    (shards / "a").write_bytes(b"old")
    monkeypatch.setattr(durable_file, "operations", RecordedOperations(fail_at=call))
    with pytest.raises(DpoCacheError, match=r"cannot write .*shards/a: No space left on device"):
        write_durably(shards / "a", b"new", temporary_folder=tmp)
    renamed = call == 4  # only the sync of the folder failed
    assert (shards / "a").read_bytes() == (b"new" if renamed else b"old")
    assert list(tmp.iterdir()) == []


def test_content_that_fails_half_way_leaves_nothing(folders: tuple[Path, Path]) -> None:
    shards, tmp = folders

    def content() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(shards / "a", content(), temporary_folder=tmp)
    assert list(shards.iterdir()) == list(tmp.iterdir()) == []


def test_a_link_in_the_place_of_the_destination_is_replaced_and_not_followed(folders: tuple[Path, Path]) -> None:
    shards, tmp = folders
    outside = tmp.parent / "outside"
    outside.write_bytes(b"precious")
    (shards / "a").symlink_to(outside)
    write_durably(shards / "a", b"new", temporary_folder=tmp)
    assert outside.read_bytes() == b"precious"
    assert not (shards / "a").is_symlink()


def test_new_folders_are_synced_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    make_folder_durably(tmp_path / "a" / "b")
    assert recorder.calls == ["make_folder a", f"sync_folder {tmp_path.name}", "make_folder b", "sync_folder a"]


def test_a_folder_that_is_there_is_synced_too_for_its_maker_may_have_died_before_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    make_folder_durably(tmp_path / "a")
    assert recorder.calls == ["make_folder a", f"sync_folder {tmp_path.name}"]
    (tmp_path / "file").touch()
    with pytest.raises(DpoCacheError, match="File exists"):
        make_folder_durably(tmp_path / "file")


def test_a_file_system_that_syncs_no_folders_holds_a_cache_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def sync_files_only(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(file)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    make_folder_durably(tmp_path / "shards")
    write_durably(tmp_path / "shards" / "a", b"rows", temporary_folder=tmp_path)
    assert (tmp_path / "shards" / "a").read_bytes() == b"rows"


def test_removal_is_synced(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, _ = folders
    (shards / "a").write_bytes(b"")
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    remove_durably(shards / "a")
    assert recorder.calls == ["remove a", "sync_folder shards"]
    with pytest.raises(DpoCacheError, match="cannot remove"):
        remove_durably(shards / "a")

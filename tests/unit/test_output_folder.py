"""Which folders a run may write to."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.training import output_folder
from dpo_cache.stages.training.output_folder import output_lock, refuse_other_folder, refuse_unshared
from run_factory import write_run


def test_a_run_is_resumed_where_it_was_moved_to_and_a_fresh_one_begins_where_there_is_nothing(tmp_path: Path) -> None:
    moved = write_run(tmp_path / "run").rename(tmp_path / "moved")
    killed = tmp_path / "killed"  # before it had written its config
    killed.mkdir()
    (killed / ".lock").write_text("17")
    (killed / f"{'0' * 16}.partial").write_text('{"sett')
    for folder in (moved, killed, tmp_path / "new"):
        refuse_other_folder(folder)


def test_the_checkpoints_of_another_trainer_are_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_100").mkdir(parents=True)
    with pytest.raises(DpoCacheError, match="is not the folder of a run: it holds checkpoints"):
        refuse_other_folder(tmp_path)


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        output_lock(tmp_path / "run"),
        pytest.raises(DpoCacheError, match=f"is in use by process {os.getpid()} on {socket.gethostname()}\n"),
        output_lock(tmp_path / "run"),
    ):
        pytest.fail("two runs write one folder")
    with output_lock(tmp_path / "run"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """Else whoever may write to the folder, or made it, could have any file of ours emptied."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("a key")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DpoCacheError, match="cannot be written"), output_lock(tmp_path / "run"):
        pytest.fail("the folder would be locked through the link")
    assert (tmp_path / "precious").read_text() == "a key"


def test_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre is, unless it is mounted with locks."""

    def refuse(_file: object, _mode: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DpoCacheError, match="run cannot be locked: Function not implemented") as refused:
        output_lock(tmp_path / "run").__enter__()
    assert "a file system with file locks" in (refused.value.next_step or "")


def test_a_folder_that_another_machine_does_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "SEEN_WITHIN_S", 0)
    with output_lock(tmp_path / "of rank 0") as holder:
        refuse_unshared(tmp_path / "of rank 0", holder)
        (tmp_path / "of an earlier run").mkdir()
        (tmp_path / "of an earlier run/.lock").write_text(f"{os.getpid()} on another-machine")
        for folder in (tmp_path / "of an earlier run", tmp_path / "absent"):
            with pytest.raises(DpoCacheError, match="is not the folder that rank 0 sees under that name"):
                refuse_unshared(folder, holder)

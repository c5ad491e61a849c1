"""What a program that asked for JSON gets when a command fails."""

from __future__ import annotations

import errno
import io
import json
import math
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from cache_factory import make_cache, make_identity
from click.testing import CliRunner
from dpo_cache.cli import dpo_cache, dpo_train
from dpo_cache.cli_output import command_run, print_report, print_summary
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.stages.console.terminal import say
from dpo_cache.stages.info import cache_info


def test_a_fault_is_one_object_on_stdout_where_json_was_asked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(dpo_cache, ["info", str(tmp_path), "--json"])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["found"] == f"there is no cache in {tmp_path}: cache.json is missing"
    assert error["next_step"].startswith("make one with: dpo-cache build")
    assert f"Error: {error['found']}" in result.stderr


@pytest.mark.parametrize(("rank", "objects"), [("0", 1), ("1", 0)])
def test_of_several_ranks_the_first_alone_prints_the_object(tmp_path: Path, rank: str, objects: int) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    result = CliRunner().invoke(dpo_cache, ["info", str(tmp_path), "--json"], env=launched)
    assert result.stdout.count("there is no cache") == objects
    assert "there is no cache" in result.stderr


def test_a_fault_leaves_stdout_empty_where_it_was_not(tmp_path: Path) -> None:
    assert CliRunner().invoke(dpo_cache, ["info", str(tmp_path)]).stdout == ""


def test_what_the_machine_refuses_is_said_without_a_traceback(tmp_path: Path) -> None:
    result = CliRunner().invoke(dpo_train, ["--cache", str(tmp_path), "--output", str(tmp_path / ("n" * 300))])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "Error: [Errno 36] File name too long" in result.stderr


def test_a_machine_without_a_folder_for_scratch_files_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a container whose file systems are read-only; another missing file is a mistake of ours."""
    with pytest.raises(FileNotFoundError), command_run():
        (tmp_path / "missing").read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(SystemExit), command_run():
        tempfile.mkdtemp()
    said = capsys.readouterr().err
    assert said.startswith("Error: [Errno 2] No usable temporary directory found in [")
    assert "next: set TMPDIR" in said


@pytest.mark.parametrize("option", [["--seed", "0"], ["--model", "m"], ["--trust-remote-code"]])
def test_an_option_of_rescoring_alone_is_refused(option: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(dpo_cache, ["verify", str(tmp_path), *option])
    assert result.exit_code == 1
    assert f"{option[0]} has no effect without --rescore" in result.stderr


def test_a_cache_from_a_stranger_does_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "evil\x1b]0;title\x07\x1b[2J\ud800"
    description = CacheDescription(identity=make_identity(), recorded={"model": evil}, vocabulary_sha256="b" * 64)
    cache = ReferenceCache.create(tmp_path / "cache", description)
    print_report(cache_info(cache.path), as_json=False)
    with pytest.raises(SystemExit), command_run():
        raise DpoCacheError(f"{evil} cannot be found")
    say(f"reference {evil}")
    print_summary(f"trained from {evil}", None)
    shown = capsys.readouterr()
    assert "reference  evil�" in shown.out
    assert shown.err.count("evil�") == 3
    assert not {"\x1b", "\x07", "\ud800"} & set(shown.out + shown.err)


def test_a_terminal_without_utf_8_gets_a_report_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    print_report(cache_info(make_cache(tmp_path / "cache-☃").path), as_json=False)
    assert b"cache-\\u2603" in written.getvalue()


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = f"{tmp_path}/caf\udce9"  # as Python reads the bytes of a path in Latin-1
    result = CliRunner().invoke(dpo_cache, ["build", "--model", "m", "--dataset", "d", "--cache", folder])
    assert result.exit_code == 2
    assert "is not UTF-8: rename it" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_home_of_a_user_that_there_is_not_is_a_folder_that_is_not_found() -> None:
    result = CliRunner().invoke(dpo_cache, ["info", "~no-such-user/cache"])
    assert result.exit_code == 1
    assert "there is no cache in ~no-such-user/cache" in result.stderr


def test_what_names_no_repository_is_not_asked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(dpo_cache, ["pull", "tulu3-cache", str(tmp_path / "cache")])
    assert result.exit_code == 1
    assert "'tulu3-cache' names no cache to pull" in result.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_ends_a_command_as_ctrl_c_does(
    signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit), command_run(to_go_on="--resume continues"):
        signal.raise_signal(signum)
    assert capsys.readouterr().err == "Stopped. Finished work is kept; --resume continues.\n"
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_that_comes_twice_does_not_disturb_the_clearing_up(
    signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    cleared = []

    def be_stopped() -> None:
        try:
            signal.raise_signal(signum)
        finally:
            signal.raise_signal(signum)
            cleared.append(True)

    with pytest.raises(SystemExit), command_run():
        be_stopped()
    assert cleared
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_lost_terminal_stops_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command_run():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_that_starts_over_does_not_promise_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for stage in ("info.cache_info", "verify.verify_cache", "build.build"):
        monkeypatch.setattr(f"dpo_cache.stages.{stage}", stop)
    for command in ("info", "verify"):
        result = CliRunner().invoke(dpo_cache, [command, str(tmp_path), "--json"])
        assert result.stderr == "Stopped.\n"
        assert json.loads(result.stdout)["error"] == {"found": "stopped", "expected": None, "next_step": None}
    result = CliRunner().invoke(dpo_cache, ["build", "--model", "m", "--dataset", "d", "--cache", str(tmp_path)])
    assert result.stderr == "Stopped. Finished work is kept; the same command continues from there.\n"


def test_a_disk_that_is_full_is_an_error_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr("dpo_cache.stages.info.cache_info", fill)
    result = CliRunner().invoke(dpo_cache, ["info", str(tmp_path), "--json"])
    assert result.exit_code == 1
    found = f"[Errno 28] No space left on device: '{tmp_path}'"
    assert json.loads(result.stdout)["error"] == {"found": found, "expected": None, "next_step": None}


def test_nobody_to_ask_is_no_consent(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    (cache.path / "tmp" / "left.partial").write_bytes(b"")
    result = CliRunner().invoke(dpo_cache, ["gc", str(cache.path), "--min-age-days", "0"], input="")
    assert result.exit_code == 1
    assert "removal was not confirmed\n  next: add --yes" in result.stderr
    assert (cache.path / "tmp" / "left.partial").exists()


def test_what_is_not_a_finite_number_is_null_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary("done", {"eval_after": {"eval/loss": math.nan}, "seconds": math.inf})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {"eval_after": {"eval/loss": None}, "seconds": None}

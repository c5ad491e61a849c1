"""metrics.jsonl survives kills and resumes; tracking never ends a run."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.run_log import MetricsFile, RunLog, Tracking, TrackingSettings

SETTINGS = TrackingSettings(project="p", config={"beta": 5.0}, name="run")


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["training_step"] for line in path.read_text().splitlines()]


def _written(path: Path, steps: int) -> Path:
    file = MetricsFile(path)
    for step in range(1, steps + 1):
        file.write({"training_step": step, "train_loss": 0.5})
    file.close()
    return path


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"training_step": 1, "train_loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"training_step": 1, "train_loss": 0.5}\n'


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    """The system's own error, "No space left on device", names neither."""
    file: Any = MetricsFile(tmp_path / "metrics.jsonl")
    file.close()

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file._file = SimpleNamespace(write=len, flush=refuse)
    with pytest.raises(DpoCacheError) as caught:
        file.write({"training_step": 1, "train_loss": 0.5})
    assert caught.value.found == f"{tmp_path}/metrics.jsonl cannot be written: No space left on device"
    assert str(caught.value.next_step).endswith("the same command with --resume")


def test_resuming_cuts_the_lines_past_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _written(tmp_path / "metrics.jsonl", 9)
    with caplog.at_level(logging.WARNING):
        MetricsFile(path, last_step=7).close()
    assert _steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert "dropped 2 lines that are torn or past step 7" in caplog.text


def test_a_fresh_start_keeps_nothing_of_a_run_that_saved_no_checkpoint(tmp_path: Path) -> None:
    """Its evaluation before the first update comes again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"training_step": 0, "eval/loss": 0.7}\n')
    MetricsFile(path, last_step=0).close()
    assert _steps(path) == []


@pytest.mark.parametrize(
    "torn", [b'{"training_step": 5, "tra', b'{"training_step": 5}', b"{}\n", b"\xff\xfe\n", b"null\n"]
)
def test_a_torn_tail_is_dropped_and_reported(tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = _written(tmp_path / "metrics.jsonl", 4)
    with path.open("ab") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING):
        resumed = MetricsFile(path, last_step=10)
    resumed.write({"training_step": 5, "train_loss": 0.5})
    assert _steps(path) == [1, 2, 3, 4, 5]
    assert "dropped 1 lines" in caplog.text


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").write({"training_step": 1, "train_loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train_loss"] is None


def _wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))


def test_tracking_that_cannot_start_falls_back_to_offline_then_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        raise ConnectionError("no route to host")

    _wandb(monkeypatch, init)
    tracking = Tracking(SETTINGS, folder=tmp_path)
    tracking.write({"training_step": 1})
    tracking.close()
    assert modes == [None, "offline"]
    assert tracking.run_id is None


def test_tracking_that_breaks_later_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def log(line: Any, step: int) -> None:
        calls.append(step)
        raise BrokenPipeError("gone")

    _wandb(monkeypatch, lambda **_: SimpleNamespace(id="abc", log=log, finish=lambda: None))
    run_log = RunLog(tmp_path, is_main=True, tracking=SETTINGS)
    assert run_log.tracking_run_id == "abc"
    for step in (1, 2, 3):
        run_log.write({"training_step": step, "train_loss": 0.5})
        run_log.advance()
    run_log.close()
    assert calls == [1]
    assert _steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert run_log.tracking_run_id == "abc"  # a run that resumes from here continues its curve


def test_a_resumed_run_that_cannot_track_leaves_its_curve_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> Any:
        raise ConnectionError("no route to host")

    _wandb(monkeypatch, init)
    settings = TrackingSettings(project="p", config={}, run_id="abc")
    assert Tracking(settings, folder=tmp_path).run_id == "abc"


def test_a_resumed_run_continues_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(id=options["id"], log=lambda *_, **__: None, finish=lambda: None)

    _wandb(monkeypatch, init)
    settings = TrackingSettings(project="p", config={}, run_id="abc", tags=("beta",))
    assert Tracking(settings, folder=tmp_path).run_id == "abc"
    assert (seen["id"], seen["resume"], seen["tags"]) == ("abc", "allow", ("beta",))


def test_offline_tracking_works_with_the_real_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = Tracking(SETTINGS, folder=tmp_path)
    assert tracking.run_id
    tracking.write({"training_step": 1, "train_loss": 0.5})
    tracking.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert "Run history" not in capfd.readouterr().err


def test_progress_shows_loss_speed_memory_and_mfu_where_it_is_known(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, object]]] = []
    progress = SimpleNamespace(reach=lambda done, **notes: seen.append((done, notes)), close=lambda: None)
    run_log = RunLog(tmp_path, is_main=True, last_step=4, progress=progress)
    speed = {"perf/tokens_per_second": 12345.6, "perf/peak_memory_gib": 1.25, "perf/mfu": 0.412}
    run_log.advance()
    run_log.write({"training_step": 5, "train_loss": 0.58731, "rewards/accuracy": 0.95, **speed})
    run_log.write({"training_step": 5, "eval/loss": 0.5})
    run_log.close()
    assert seen == [(5, {}), (5, {"loss": "0.587", "acc": "95%", "tok/s": "12,346", "GiB": "1.2", "mfu": "41%"})]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, is_main=False, tracking=SETTINGS)
    run_log.write({"training_step": 1})
    run_log.advance()
    run_log.close()
    assert list(tmp_path.iterdir()) == []

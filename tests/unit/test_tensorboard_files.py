"""What TensorBoard reads back is what metrics.jsonl says; nothing about it ends a run."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.run_log import RunLog
from dpo_cache.pipeline.training.tensorboard_files import require_tensorboard, tag_of


def read_back(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Every value by curve and step, as TensorBoard itself would draw it."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def values_of(metrics: Path) -> dict[tuple[str, int], list[float]]:
    """The same, from metrics.jsonl; event files hold 32 bits of a number."""
    found: dict[tuple[str, int], list[float]] = {}
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        step = line.pop("training_step")
        for name, value in line.items():
            found.setdefault((tag_of(name), step), []).append(float(np.float32(value)))
    return found


def write_steps(folder: Path, steps: range, *, last_step: int, evaluate_first: bool = False) -> RunLog:
    run_log = RunLog(folder, is_main=True, last_step=last_step, tensorboard=True)
    if evaluate_first:
        run_log.write({"training_step": last_step, "eval/loss": 0.7})
    for step in steps:
        run_log.write({"training_step": step, "learning_rate": 5e-7, "train_loss": 1 / step, "perf/mfu": step / 7})
        if step % 3 == 0:
            run_log.write({"training_step": step, "eval/loss": step / 3, "eval/rewards/margin": -step / 9})
    return run_log


def test_a_run_that_is_killed_and_resumed_draws_every_step_once_with_the_values_of_metrics(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8), last_step=0, evaluate_first=True)  # and never closed
    write_steps(tmp_path, range(4, 11), last_step=3).close()
    drawn = read_back(tmp_path / "tensorboard")
    assert drawn == values_of(tmp_path / "metrics.jsonl")
    assert [step for tag, step in sorted(drawn) if tag == "train/loss"] == list(range(1, 11))
    assert [step for tag, step in sorted(drawn) if tag == "eval/rewards/margin"] == [3, 6, 9]


def test_a_run_that_starts_from_the_beginning_again_takes_everything_back(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4), last_step=0, evaluate_first=True)
    write_steps(tmp_path, range(1, 3), last_step=0, evaluate_first=True).close()
    drawn = read_back(tmp_path / "tensorboard")
    assert {len(values) for values in drawn.values()} == {1}
    assert {step for _, step in drawn} == {0, 1, 2}


def test_event_files_that_cannot_be_written_leave_the_run_and_its_metrics_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(1, 3), last_step=0).close()
    assert "metrics.jsonl goes on" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_event_files_that_break_later_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_log = write_steps(tmp_path, range(1, 3), last_step=0)
    events: Any = run_log._events

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events._writer, "flush", full)
    for step in (3, 4):
        run_log.write({"training_step": step, "train_loss": 0.5})
    run_log.close()
    assert events._writer is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(DpoCacheError, match="--with-tensorboard needs tensorboard"):
        require_tensorboard()

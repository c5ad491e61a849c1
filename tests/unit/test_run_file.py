"""A reader of a run's folder never sees half a file, and a full disk loses nothing that was there."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.cache.durable_file import Bytes, FileOperations
from dpo_cache.pipeline.training.bad_batch import report_bad_batch
from dpo_cache.pipeline.training.eval_margins import EVAL_MARGINS, write_eval_margins
from dpo_cache.pipeline.training.run_file import write_run_file, write_run_json
from dpo_cache.pipeline.training.run_log import MetricsFile
from dpo_cache.pipeline.training.step_zero import StepZeroFigures
from dpo_cache.stages.sweeping.sweep_report import SweepReport, recorded
from dpo_cache.stages.training.best_model import BestModel
from dpo_cache.stages.training.step_zero_proof import recorded_figures
from dpo_cache.stages.training.train_dry_run import DryRunReport
from dpo_cache.stages.training.train_report import TrainReport

STEP_ZERO = StepZeroFigures(
    dtype="float32",
    pairs=1,
    sides=2,
    mean_per_token=0.0,
    max_per_token=0.0,
    max_in_bounds=0.0,
    bound_per_token=1e-4,
    loss=0.7,
    expected_loss=0.7,
    within_bound=True,
)
DRY_RUN = DryRunReport(seconds_per_step=1.0, hours=1.0, seconds_per_save=1.0, peak_memory_gib=1.0, steps=1)


class FullDisk(FileOperations):
    """Takes the first half of a write."""

    def write(self, file: int, data: Bytes) -> None:
        super().write(file, memoryview(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_bad_batch(folder: Path) -> None:
    report_bad_batch(folder / "bad_batch.json", reason="loss", training_step=1, keys=[b"key"])


def write_margins(folder: Path) -> None:
    write_eval_margins(folder / EVAL_MARGINS, training_step=1, keys=np.zeros((1, 32), np.uint8), margins=np.ones(1))


def write_sweep(folder: Path) -> None:
    SweepReport(output=str(folder), cache="c", strategy="grid", judged_by="", builds=(), rows=()).write()


def keep_best(folder: Path) -> None:
    line: dict[str, float] = {"training_step": 1, "eval/rewards/accuracy": 1.0}
    BestModel(folder, by="accuracy", last_step=0).remember(line, is_main=True)


WRITERS: dict[str, Callable[[Path], object]] = {
    "step0.json": lambda folder: write_run_json(folder / "step0.json", asdict(STEP_ZERO)),
    "bad_batch.json": write_bad_batch,
    "metrics.jsonl": lambda folder: MetricsFile(folder / "metrics.jsonl", last_step=1),
    EVAL_MARGINS: write_margins,
    "dry-run.json": DRY_RUN.write,
    "best.json": keep_best,
    "sweep.json": write_sweep,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("one_rank")
def test_a_full_disk_leaves_the_file_of_a_run_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = '{"training_step": 9, "field": "", "value": 0.0}'
    (tmp_path / name).write_text(before)
    monkeypatch.setattr(durable_file, "operations", FullDisk())
    with pytest.raises(DpoCacheError, match=r"cannot write .*No space left on device"):
        WRITERS[name](tmp_path)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == before


def test_a_file_of_a_run_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_run_file(tmp_path / "file", "a long text, in UTF-8: β\n")
    write_run_json(tmp_path / "file", {"short": 1})
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{\n  "short": 1\n}\n'
    assert os.listdir(tmp_path) == ["file"]


READERS: dict[str, Callable[[Path], object]] = {
    "step0.json": lambda folder: recorded_figures(folder / "step0.json"),
    "dry-run.json": DryRunReport.read,
    "best.json": lambda folder: BestModel(folder, by="accuracy", last_step=0),
    "summary.json": TrainReport.read,
    "sweep.json": recorded,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", ["", "null", '{"training_step": '])
def test_a_file_of_a_run_that_was_spoiled_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DpoCacheError, match=f"{name} cannot be read: .*") as refused:
        READERS[name](tmp_path)
    assert refused.value.next_step == "restore it from a copy, or remove it"


def test_a_number_that_is_not_finite_is_null_in_every_file_of_a_run(tmp_path: Path) -> None:
    write_run_json(tmp_path / "file", {"figures": [math.nan, {"loss": -math.inf}], "pair": (1.5, np.float64("nan"))})
    read = json.loads((tmp_path / "file").read_text(), parse_constant=pytest.fail)
    assert read == {"figures": [None, {"loss": None}], "pair": [1.5, None]}

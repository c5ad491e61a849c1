"""A sweep with real processes: one build, no reference after it, stopped and gone on with, halved."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import dpo_cache, dpo_train, run
from dpo_cache.cli import dpo_sweep
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.stages.processes.child_processes import Job
from dpo_cache.stages.sweep import sweep
from dpo_cache.stages.sweeping import sweep_processes
from dpo_cache.stages.sweeping.sweep_config import SweepConfig
from dpo_cache.stages.sweeping.sweep_report import SweepReport
from forked_process import forked_children
from safetensors.torch import load_file
from tiny_model import message_pairs, write_rows, write_tiny_model

STEPS = 24
FAILING = "use-liger-kernel-true"
TRAIN = {"eval-mixture": "train", "global-batch-size": 8, "learning-rate": 1e-3, "max-steps": STEPS}


def write_grid(folder: Path, output: str, **file: Any) -> Path:
    content = {"cache": str(folder / "cache"), "output": str(folder / output), "train": TRAIN, **file}
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _quick_children() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() else forked_children():
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference and pairs; no cache yet."""
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_model(folder / "reference")
    write_rows(folder / "pairs.jsonl", message_pairs(24))
    return folder


@pytest.fixture(scope="module")
def grid(workplace: Path) -> Path:
    """Two values of beta, and a point that no CPU can train."""
    build = {"model": str(workplace / "reference"), "dataset": str(workplace / "pairs.jsonl")}
    points = [{"use-liger-kernel": True}]
    return write_grid(workplace, "runs", build=build, grid={"beta": [2, 5]}, points=points)


@pytest.fixture(scope="module")
def stopped(workplace: Path, grid: Path) -> str:
    """What a sweep says that gets SIGTERM in the middle of its first point."""
    command = [sys.executable, "-c", "from dpo_cache.cli import dpo_sweep; dpo_sweep()", str(grid)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = workplace / "runs/beta-2/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (lines.exists() and "train_loss" in lines.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    return said


@pytest.fixture(scope="module")
def finished(workplace: Path, grid: Path, stopped: str) -> dict[str, Any]:
    """The report of the same command once more, which runs to its end."""
    done = CliRunner().invoke(dpo_sweep, [str(grid), "--parallel", "2", "--json"])
    assert done.exit_code == 1, done.stderr  # a point has failed
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def test_a_sweep_asked_to_stop_saves_what_is_under_way(workplace: Path, stopped: str) -> None:
    assert "Stopped. Finished work is kept; the same command continues from there." in stopped
    (checkpoint,) = (workplace / "runs/beta-2/checkpoints").iterdir()
    assert (checkpoint / "COMPLETE").exists()
    assert 0 < int(checkpoint.name.removeprefix("step_")) < STEPS
    assert not (workplace / "runs/beta-5").exists()
    log = (workplace / "runs/logs/beta-2.log").read_text()
    assert "stopping: a checkpoint is saved after this update" in log
    assert re.search(r"the checkpoint after update \d+ of \d+ is saved", log)
    warning = "warning: 24 of 24 evaluation pairs are also trained on"
    assert stopped.count(warning) == 1  # by the sweep, once for all points
    assert warning in log  # and by the run


def test_the_same_command_goes_on_and_a_failing_point_does_not_stop_the_others(
    workplace: Path, finished: dict[str, Any]
) -> None:
    rows = rows_of(finished)
    assert [row["status"] for row in finished["rows"]] == ["finished", "finished", "failed"]
    assert "resuming from" in (workplace / "runs/logs/beta-2.log").read_text()
    assert "--use-liger-kernel needs a GPU" in rows[FAILING]["fault"]
    for name in ("beta-2", "beta-5"):
        assert (workplace / "runs" / name / "model/model.safetensors").exists()
        assert rows[name]["step0_loss"] == pytest.approx(0.693147, abs=1e-5)
        summary = json.loads((workplace / "runs" / name / "summary.json").read_text())
        assert rows[name]["accuracy"] == summary["eval_after"]["eval/rewards/accuracy"] > 0.5
        assert rows[name]["margin"] == summary["eval_after"]["eval/rewards/margin"]
    figures = [(row["accuracy"], row["separation"]) for row in finished["rows"][:2]]
    assert figures == sorted(figures, reverse=True)
    for name, beta in (("beta-2", 2), ("beta-5", 5)):
        assert rows[name]["separation"] == rows[name]["margin"] / beta
    with (workplace / "runs/sweep.csv").open() as table:
        assert [row["name"] for row in csv.DictReader(table)] == [row["name"] for row in finished["rows"]]


def test_the_report_has_the_forward_passes_of_the_one_build(workplace: Path, finished: dict[str, Any]) -> None:
    (built,) = finished["builds"]  # by the start that was stopped; the second found everything there
    assert built["pairs_scored"] == 24
    assert finished["reference_forwards"] == built["reference_forwards"] > 0
    assert "once for all runs" in (workplace / "runs/sweep.md").read_text()


def only_noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the points that a sweep would start."""
    names: list[str] = []

    def note(jobs: list[Job], *_: object, **__: object) -> None:
        names.extend(job.name for job in jobs)

    monkeypatch.setattr(sweep_processes, "run_jobs", note)
    return names


def test_a_third_start_has_only_the_failed_point_to_run(
    grid: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = only_noted(monkeypatch)
    report = sweep(grid, SweepConfig())
    assert started == [FAILING]
    assert isinstance(report, SweepReport)
    before, now = rows_of(finished), rows_of(report.to_json())
    assert {name: now[name] for name in ("beta-2", "beta-5")} == {name: before[name] for name in ("beta-2", "beta-5")}


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"learning-rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
        ({"eval-mixture": None}, "eval_mixture was 'train' and is None"),
        ({"model-saving-steps": 2}, "model_saving_steps was None and is 2"),
        ({"loss": "dpo_norm=0.5"}, "loss.losses.0.weight was 1.0 and is 0.5"),
    ],
)
def test_a_finished_point_is_not_taken_for_one_of_other_settings(
    workplace: Path,
    finished: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    difference: str,
) -> None:
    started = only_noted(monkeypatch)
    other = write_grid(workplace, "runs", train={**TRAIN, **changed}, grid={"beta": [2]})
    with pytest.raises(DpoCacheError, match=f"beta-2 holds a run .*{re.escape(difference)}"):
        sweep(other, SweepConfig())
    assert not started


@pytest.mark.parametrize(
    "saving",
    [
        {"gradient-checkpointing": True, "tokens-per-microbatch": 64, "num-gpus": 2},
        {"activation-memory-budget": 0.5, "zero-stage": 2, "offload-optimizer": True},
        {"global-batch-size": None, "gradient-accumulation-steps": 8, "eval-steps": 12},  # the same batches
    ],
)
def test_a_finished_point_counts_where_only_memory_and_speed_are_set_otherwise(
    workplace: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, saving: dict[str, Any]
) -> None:
    started = only_noted(monkeypatch)
    report = sweep(write_grid(workplace, "runs", train={**TRAIN, **saving}, grid={"beta": [2]}), SweepConfig())
    assert isinstance(report, SweepReport)
    assert [row.status for row in report.rows] == ["finished"]
    assert not started


def test_a_stopped_point_keeps_the_zero_stage_of_its_checkpoint_and_may_save_memory_otherwise(
    workplace: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workplace / "runs/beta-2", workplace / "stopped/beta-2")
    (workplace / "stopped/beta-2/summary.json").unlink()
    started = only_noted(monkeypatch)
    grid = {"beta": [2]}
    with pytest.raises(DpoCacheError, match="zero_stage was 3 and is 2"):
        sweep(write_grid(workplace, "stopped", train={**TRAIN, "zero-stage": 2}, grid=grid), SweepConfig())
    sweep(write_grid(workplace, "stopped", train={**TRAIN, "gradient-checkpointing": True}, grid=grid), SweepConfig())
    assert started == ["beta-2"]


def test_points_that_were_not_evaluated_at_a_rung_are_not_compared_there(
    workplace: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = only_noted(monkeypatch)
    grid = write_grid(workplace, "runs", grid={"beta": [2, 5]})  # finished without halving, evaluated at the end alone
    sweep(grid, SweepConfig(strategy="halving", rungs=2))
    assert not started
    said = capsys.readouterr().err
    assert "not evaluated after 50% of the updates, so not compared there: beta-2, beta-5" in said
    assert "will continue" not in said


def test_halving_leaves_the_better_point_where_it_would_have_ended_without(
    workplace: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(workplace, "halved", grid={"beta": [2, 5]})
    halving = SweepConfig(strategy="halving", rungs=2)
    report = sweep(grid, halving)
    assert isinstance(report, SweepReport)
    assert [(row.name, row.status, row.steps) for row in report.rows] == [
        ("beta-2", "finished", STEPS),  # by margin / beta: the accuracies are equal, and the larger margin is beta's
        ("beta-5", "given up", STEPS // 2),
    ]
    assert not (workplace / "halved/beta-5/model").exists()
    ours, unbroken = (load_file(workplace / f"{sweep}/beta-2/model/model.safetensors") for sweep in ("halved", "runs"))
    assert ours.keys() == unbroken.keys()
    for name, weight in unbroken.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)
    lines = [
        [json.loads(line) for line in (workplace / f"{sweep}/beta-2/metrics.jsonl").read_text().splitlines()]
        for sweep in ("halved", "runs")
    ]
    rates, rates_unbroken = ([line["learning_rate"] for line in run if "learning_rate" in line] for run in lines)
    assert rates == rates_unbroken
    assert len(rates) == STEPS

    started = only_noted(monkeypatch)  # the same decisions once more, from what is on the disk
    again = sweep(grid, halving)
    assert not started
    assert isinstance(again, SweepReport)
    assert again.to_json() == report.to_json()


def test_a_plan_prints_commands_and_starts_nothing(workplace: Path, finished: dict[str, Any]) -> None:
    grid = write_grid(workplace, "planned", grid={"beta": [2, 5]})
    plan = sweep(grid, SweepConfig(plan=True))
    assert not isinstance(plan, SweepReport)
    assert plan.text().splitlines()[0].startswith(f"dpo-train --cache={workplace}/cache --output={workplace}/planned/")
    assert "--beta=2.0" in plan.text()
    assert not (workplace / "planned").exists()


def test_a_plan_begins_with_the_builds_that_make_the_cache_its_points_train_from(workplace: Path) -> None:
    build = {"model": str(workplace / "reference"), "dataset": f"{workplace}/pairs.jsonl,split=train[:50%]"}
    grid = write_grid(
        workplace,
        "built-by-hand",
        cache=str(workplace / "cache by hand"),
        build=[{**build, "mixture": name} for name in ("train", "held-out")],
        train={**TRAIN, "eval-mixture": "held-out"},
        points=[{}],
    )
    plan = CliRunner().invoke(dpo_sweep, [str(grid), "--plan"]).stdout.splitlines()
    as_json = json.loads(CliRunner().invoke(dpo_sweep, [str(grid), "--plan", "--json"]).stdout)
    assert plan == [*as_json["builds"].values(), *as_json["points"].values()]
    assert list(as_json["builds"]) == ["train", "held-out"]
    assert not (workplace / "cache by hand").exists()
    for line in plan[:2]:
        assert line.startswith("dpo-cache build ")
        assert run(dpo_cache(*shlex.split(line)[1:]))["training_pairs"] == 12
    assert ReferenceCache.open(workplace / "cache by hand").mixture_names() == ["held-out", "train"]
    assert plan[2].startswith("dpo-train ")
    run(dpo_train(*shlex.split(plan[2])[1:], "--plan"))


@pytest.mark.parametrize(
    ("train", "message"),
    [({}, "judges by held-out pairs, and point defaults has none"), ({"loss": "simpo"}, "and the loss of point")],
)
def test_halving_needs_something_to_judge_by(
    workplace: Path, finished: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    mixture = {"eval-mixture": "train"} if train else {}
    grid = write_grid(workplace, "unjudged", train={**train, **mixture}, points=[{}])
    with pytest.raises(DpoCacheError, match=message):
        sweep(grid, SweepConfig(strategy="halving"))

"""The table of a sweep: the best first, in every form the same figures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cache.stages.sweeping.sweep_report import SweepBuild, SweepReport, SweepRow


def row(name: str, **fields: Any) -> SweepRow:
    defaults: dict[str, Any] = {
        "options": {"beta": name},
        "status": "finished",
        "steps": 8,
        "total_steps": 8,
        "accuracy": 0.5,
        "margin": 0.1,
        "separation": 0.02,
        "step0_loss": 0.6931,
        "seconds": 12.0,
        "fault": None,
    }
    return SweepRow(name=name, **(defaults | fields))


ROWS = (
    row("failed", status="failed", steps=0, accuracy=None, margin=None, fault="--beta is odd\n  next: even"),
    row("third", accuracy=0.7, margin=9.0),
    row("given-up-early", status="given up", steps=2, accuracy=0.99),
    row("given-up-later", status="given up", steps=4, accuracy=0.6),
    row("second", accuracy=0.8, margin=0.4, separation=0.04),  # the larger margin by its larger beta alone
    row("first", accuracy=0.8, margin=0.3, separation=0.15),
    row("no-rewards", accuracy=None, margin=None, separation=None),
)
ORDER = ["first", "second", "third", "no-rewards", "given-up-later", "given-up-early", "failed"]


def report(folder: Path) -> SweepReport:
    return SweepReport(
        output=str(folder),
        cache="c",
        strategy="grid",
        judged_by="the held-out pairs",
        builds=(SweepBuild(mixture="train", pairs_scored=40, reference_forwards=3, seconds=1.0),),
        rows=tuple(sorted(ROWS, key=SweepRow.place)),
    )


def test_points_are_sorted_by_accuracy_then_by_margin_over_beta_and_unfinished_ones_come_last(tmp_path: Path) -> None:
    assert [row.name for row in report(tmp_path).rows] == ORDER


def test_points_of_one_accuracy_are_tied_and_none_of_them_is_called_the_best(tmp_path: Path) -> None:
    told = report(tmp_path)
    assert told.to_json()["best"] == ["first", "second"]
    assert "best: first, second (tied)\n" in told.text()
    assert "Best: first, second (tied)." in told.markdown()
    alone = replace(told, rows=told.rows[2:])
    assert f"best: third\nmodel: {tmp_path}/third/model" in alone.text()
    without_rewards = replace(told, rows=told.rows[3:])
    assert not without_rewards.best
    assert "best:" not in without_rewards.text()


def test_all_three_files_tell_the_same(tmp_path: Path) -> None:
    report(tmp_path).write()
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    lines = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    table = [line for line in (tmp_path / "sweep.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [row["name"] for row in rows] == [line["name"] for line in lines] == ORDER
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == ORDER
    assert [line["accuracy"] for line in lines[:4]] == ["0.8", "0.8", "0.7", ""]
    assert lines[-1]["fault"] == "--beta is odd next: even"
    assert [line["beta"] for line in lines] == ORDER


def test_a_sweep_counts_what_its_builds_cost(tmp_path: Path) -> None:
    told = report(tmp_path)
    assert told.to_json()["reference_forwards"] == 3
    assert "Forward passes of the reference: 3 in building the cache" in told.text()
    assert "Forward passes of the reference: 3 in building the cache" in told.markdown()
    assert "none, as the cache was complete" in replace(told, builds=()).text()
    assert told.num_failed == 1
    assert "failed: failed\n  --beta is odd\n    next: even" in told.text()

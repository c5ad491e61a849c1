from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dpo_cache.pipeline.report.run_record import is_run, logged_line, read_run
from hypothesis import given
from hypothesis import strategies as st
from run_factory import step_line, write_run


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), name="run")
    assert (run.updates_done, run.total_updates, run.is_finished, run.unreadable_lines) == (13, 13, True, 0)
    assert [int(line["training_step"]) for line in run.evaluations] == [0, 5, 10, 13]
    assert run.last("train_loss") == step_line(13)["train_loss"]
    assert run.step_zero is not None
    assert run.step_zero["within_bound"]


def test_of_a_killed_run_the_torn_line_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=7)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-10])
    run = read_run(folder, name="run")
    assert (run.updates_done, run.is_finished, run.unreadable_lines) == (6, False, 1)


def test_a_null_is_a_number_that_was_not_finite(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=1)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"training_step": 2, "train_loss": None, "note": "<b>", "flag": True}) + "\n")
    run = read_run(folder, name="run")
    assert run.steps[-1].keys() == {"training_step", "train_loss"}
    assert math.isnan(run.steps[-1]["train_loss"])
    assert run.last("train_loss") is None


def test_a_run_that_was_killed_before_its_first_update_is_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", updates=0)
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert is_run(folder)
    run = read_run(folder, name="run")
    assert (run.steps, run.settings, run.total_updates, run.is_finished) == ([], {}, None, False)


def test_margins_come_by_size_and_a_pair_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", margins=[("b", 2.0), ("a", -1.0), ("b", 2.0), ("c", 0.5)])
    with (folder / "eval_margins.jsonl").open("a") as margins:
        margins.write('{"key": "d", "rewards/margin": null}\n{"key": 7, "rewards/margin": 1}\n')
    run = read_run(folder, name="run")
    assert [(pair.key, pair.margin) for pair in run.eval_margins] == [("a", -1.0), ("c", 0.5), ("b", 2.0)]


@given(content=st.one_of(st.binary(max_size=200), st.text(alphabet='{}[]":,0e9ntraining_step \n', max_size=200)))
def test_no_content_of_the_files_makes_reading_fail(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    raw = content if isinstance(content, bytes) else content.encode()
    for name in ("metrics.jsonl", "config.json", "step0.json", "summary.json", "eval_margins.jsonl"):
        (folder / name).write_bytes(raw)
    read_run(folder, name="run")


@pytest.mark.parametrize("step", ["1e400", "NaN", "null", '"1"', "true", "[]"])
def test_a_line_without_a_step_is_none(tmp_path: Path, step: str) -> None:
    folder = write_run(tmp_path / "run", updates=1, evaluate_every=None)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(f'{{"training_step": {step}, "train_loss": 1}}\n')
    run = read_run(folder, name="run")
    assert (len(run.steps), run.unreadable_lines) == (1, 1)


def test_the_last_line_of_a_step_that_has_a_field_is_found_with_what_was_not_a_number(tmp_path: Path) -> None:
    lines = (
        '{"training_step": 2, "eval/loss": 0.5}\n{"training_step": 2, "train_loss": 0.7}\n'
        '{"training_step": 2, "eval/loss": 0.4, "eval/rewards/accuracy": null}\n'
        '{"training_step": 3, "eval/loss": 0.1}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(lines)
    line = logged_line(tmp_path, 2, "eval/loss")
    assert line == {"training_step": 2, "eval/loss": 0.4, "eval/rewards/accuracy": pytest.approx(math.nan, nan_ok=True)}
    assert logged_line(tmp_path, 4, "eval/loss") is None

"""Checkpoints: whole or skipped by name, and going on from one is going on."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.training.checkpoint_folder import (
    MARKER,
    Checkpoint,
    TrainerState,
    bytes_later_than,
    newest_checkpoint,
    num_complete,
    open_checkpoint,
    remove_later_than,
    remove_unfinished,
)
from dpo_cache.pipeline.training.checkpoints import (
    convert_checkpoint,
    load_checkpoint,
    needs_conversion,
    save_checkpoint,
)
from dpo_cache.pipeline.training.disk_space import PlannedFiles, check_free_space, planned_sizes
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from recorded_operations import RecordedOperations
from torch import nn
from training_factory import make_engine, random_pairs, train_steps, trained_weights

RUN = {"mixture": "a1b2", "seed": 42, "global_batch_size": 6}
STATE = TrainerState(step=3, num_ranks=2, zero_stage=3, run=RUN, tracking_run_id="wandb-id")
BATCHES = [random_pairs(6, seed=step) for step in range(5)]
CASES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]


def _fake_engine(*, fails: bool = False) -> Any:
    """Saves one small file, or dies half way through it."""

    def save(folder: str, tag: str, **_: Any) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "weights.pt").write_bytes(b"w" * (3 if fails else 100))
        if fails:
            raise OSError(28, "No space left on device")

    return SimpleNamespace(rank=0, zero_stage=0, deepspeed=SimpleNamespace(save_checkpoint=save))


def _saved(folder: Path, step: int, *, keep_last: int | None = None) -> Path:
    return save_checkpoint(_fake_engine(), folder, replace(STATE, step=step), keep_last=keep_last)


@pytest.mark.usefixtures("one_rank")
def test_what_was_saved_is_what_is_found(tmp_path: Path) -> None:
    path = _saved(tmp_path, 3)
    assert newest_checkpoint(tmp_path) == Checkpoint(path=path, state=STATE)
    assert open_checkpoint(path).state == STATE
    assert set(json.loads((path / MARKER).read_text())["files"]) == {"engine/weights.pt", "trainer_state.json"}


@pytest.mark.usefixtures("one_rank")
def test_a_checkpoint_is_on_the_disk_before_it_is_marked_and_told_of_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves a marker that vouches for files of the right size and no content."""
    recorder = RecordedOperations()
    monkeypatch.setattr(durable_file, "operations", recorder)
    _saved(tmp_path / "checkpoints", 3)
    marked = recorder.calls.index(f"rename to step_3/{MARKER}")
    before, after = recorder.calls[:marked], recorder.calls[marked:]
    for name in ("weights.pt", "trainer_state.json"):
        assert before[before.index(f"open {name}") + 1] == "sync"
    assert {"sync_folder engine", "sync_folder step_3"} <= set(before)
    assert after == [f"rename to step_3/{MARKER}", "sync_folder step_3", "sync_folder checkpoints"]


def save_with_a_slow_rank(folder: str) -> list[str]:
    rank = dist.get_rank()

    def save(path: str, tag: str, **_: Any) -> None:
        time.sleep(0.5 * rank)
        (Path(path) / tag).mkdir(exist_ok=True)
        (Path(path) / tag / f"weights_{rank}.pt").touch()

    engine: Any = SimpleNamespace(rank=rank, zero_stage=0, deepspeed=SimpleNamespace(save_checkpoint=save))
    path = save_checkpoint(engine, Path(folder), STATE, keep_last=None)
    return sorted(json.loads((path / MARKER).read_text())["files"])


def test_a_checkpoint_is_marked_once_the_slowest_rank_has_written_its_part(tmp_path: Path) -> None:
    """Else one that lacks a rank's optimizer state counts as complete, and is found out when it is loaded."""
    files = ["engine/weights_0.pt", "engine/weights_1.pt", "trainer_state.json"]
    assert run_ranks(save_with_a_slow_rank, str(tmp_path), num_ranks=2) == [files, files]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / MARKER).unlink(), "it has no COMPLETE, so saving it was cut short"),
        (lambda path: (path / MARKER).write_text('{"fil'), "its COMPLETE cannot be read"),
        (lambda path: (path / MARKER).write_text("[]"), "its COMPLETE cannot be read"),
        (lambda path: (path / MARKER).write_text('{"files": []}'), "its COMPLETE cannot be read"),
        (lambda path: (path / "engine/weights.pt").unlink(), "engine/weights.pt is missing"),
        (lambda path: (path / "engine/weights.pt").write_bytes(b"w" * 99), "has 99 bytes instead of 100"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_skipped_and_named(
    tmp_path: Path, damage: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, damaged = _saved(tmp_path, 9), _saved(tmp_path, 10)
    damage(damaged)
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.path == whole
    assert f"skipped checkpoint {damaged}" in caplog.text
    assert reason in caplog.text
    with pytest.raises(DpoCacheError, match=f"{damaged} cannot be resumed from"):
        open_checkpoint(damaged)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("named", [".", "checkpoints"])
def test_the_folder_of_a_run_is_no_checkpoint_and_the_newest_in_it_is_named(tmp_path: Path, named: str) -> None:
    """It was said to be a checkpoint whose saving had been cut short."""
    run = tmp_path / "my run"
    newest, damaged = _saved(run / "checkpoints", 9), _saved(run / "checkpoints", 10)
    (damaged / MARKER).unlink()
    with pytest.raises(DpoCacheError, match="it holds checkpoints, and is none itself") as caught:
        open_checkpoint(run / named)
    assert caught.value.next_step == f"--resume '{newest}' takes the newest"


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_fails_leaves_the_last_one_and_can_be_repeated(tmp_path: Path) -> None:
    good = _saved(tmp_path, 1)
    with pytest.raises(DpoCacheError, match=r"step_2 could not be written: .*No space left on device"):
        save_checkpoint(_fake_engine(fails=True), tmp_path, replace(STATE, step=2), keep_last=1)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.path == good
    assert _saved(tmp_path, 2) == tmp_path / "step_2"
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.path == tmp_path / "step_2"


@pytest.mark.usefixtures("one_rank")
def test_only_the_last_k_are_kept_and_steps_are_numbers_not_words(tmp_path: Path) -> None:
    (tmp_path / "step_8").mkdir()  # what a kill left
    for step in (7, 9, 10, 11):
        _saved(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10", "step_11"]


@pytest.mark.usefixtures("one_rank")
def test_what_is_held_is_complete_and_what_is_later_goes(tmp_path: Path) -> None:
    assert num_complete(tmp_path, up_to=3) == bytes_later_than(0, tmp_path) == 0
    for step in (1, 2, 3):
        _saved(tmp_path, step)
    sizes = [file.stat().st_size for file in (tmp_path / "step_3").rglob("*") if file.is_file()]
    (tmp_path / "step_2" / MARKER).unlink()
    assert num_complete(tmp_path, up_to=2) == 1
    assert num_complete(tmp_path, up_to=3) == 2
    assert bytes_later_than(2, tmp_path) == sum(sizes)


@pytest.mark.usefixtures("one_rank")
def test_a_run_that_goes_on_from_before_others_saves_as_if_they_had_never_been(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        _saved(tmp_path, step)
    (tmp_path / "step_8").mkdir()  # what a kill left
    assert [path.name for path in remove_later_than(2, tmp_path)] == ["step_8", "step_6", "step_4"]
    _saved(tmp_path, 3, keep_last=1)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_3"]


@pytest.mark.usefixtures("one_rank")
def test_what_a_kill_left_in_the_middle_of_a_save_goes_and_a_damaged_checkpoint_stays(tmp_path: Path) -> None:
    whole, damaged = _saved(tmp_path, 2), _saved(tmp_path, 4)
    (damaged / "engine/weights.pt").unlink()
    (tmp_path / "step_6/engine").mkdir(parents=True)
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.glob("step_*")) == [whole, damaged]


PLANNED = PlannedFiles(checkpoint_bytes=100, model_bytes=40, checkpoints_to_save=8, keep_last=3)


@pytest.mark.parametrize(
    ("change", "checkpoints", "models"),
    [
        ({}, 4, 0),  # while the fourth is saved; there is more room for the model once one of them has gone
        ({"checkpoints_to_save": 1}, 1, 1),
        ({"checkpoints_to_save": 3}, 3, 1),
        ({"keep_last": None}, 8, 1),
        ({"model_bytes": 400}, 3, 1),
        ({"saves_model": False, "checkpoints_to_save": 2}, 2, 0),
        ({"keeps_best": True}, 4, 1),
        ({"models_to_save": 5}, 4, 5),
        ({"models_to_save": 5, "keeps_best": True, "checkpoints_to_save": 1}, 1, 7),
        ({"keeps_best": True, "model_bytes": 400}, 3, 2),
        ({"keeps_best": True, "has_best": True, "model_bytes": 400}, 3, 1),
        # A resumed run.
        ({"checkpoints_held": 3}, 1, 0),
        ({"checkpoints_held": 3, "model_bytes": 400}, 0, 1),
        ({"checkpoints_held": 1, "checkpoints_to_save": 1}, 1, 1),
        ({"checkpoints_held": 2, "keep_last": None}, 8, 1),
        ({"checkpoints_held": 3, "checkpoints_to_save": 0}, 0, 1),  # only the model is saved once more
        ({"checkpoints_held": 5}, 1, 0),  # fewer are kept than before
        ({"checkpoints_held": 5, "model_bytes": 400}, -2, 1),
    ],
)
def test_room_is_needed_for_what_is_still_to_be_written_at_the_fullest_moment(
    change: dict[str, Any], checkpoints: int, models: int
) -> None:
    assert replace(PLANNED, **change).most_at_once() == (checkpoints, models)


@pytest.mark.parametrize(
    ("zero_stage", "weight_bytes", "bytes_per_weight"), [(0, 4, 12), (0, 2, 14), (1, 4, 16), (2, 2, 14), (3, 4, 12)]
)
def test_a_checkpoint_holds_what_is_trained_as_deepspeed_keeps_it_at_this_stage(
    zero_stage: int, weight_bytes: int, bytes_per_weight: int
) -> None:
    trained, frozen = (nn.Parameter(torch.empty(1000, device="meta"), requires_grad=on) for on in (True, False))

    def sizes(*, only_adapter: bool) -> dict[str, int]:
        return planned_sizes(
            [trained, frozen],
            zero_stage=zero_stage,
            weight_bytes=weight_bytes,
            saved_bytes=2,
            only_adapter=only_adapter,
        )

    assert sizes(only_adapter=False) == {"checkpoint_bytes": 1000 * bytes_per_weight, "model_bytes": 4000}
    assert sizes(only_adapter=True) == {"checkpoint_bytes": 1000 * bytes_per_weight, "model_bytes": 2000}


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    disk_usage = SimpleNamespace(total=100 * gib, free=13 * gib)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk_usage)
    planned = PlannedFiles(checkpoint_bytes=4 * gib, model_bytes=gib, checkpoints_to_save=3, keep_last=3)
    check_free_space(tmp_path, planned)
    disk_usage.free -= 1
    with pytest.raises(DpoCacheError, match=r"13\.0 GiB free\n.*13\.0 GiB for 3 more checkpoints and 1 more model\n"):
        check_free_space(tmp_path, planned)
    with pytest.raises(DpoCacheError, match=r"for 3 more checkpoints and 3 more models\n.*, or save fewer models"):
        check_free_space(tmp_path, replace(planned, models_to_save=2))
    check_free_space(tmp_path, planned, freed_bytes=1)
    disk_usage.total = disk_usage.free = 0  # a file system of FUSE that gives no numbers
    check_free_space(tmp_path, planned)


def test_a_conversion_that_fails_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "step_3/engine").mkdir(parents=True)
    checkpoint = Checkpoint(path=tmp_path / "step_3", state=STATE)
    with pytest.raises(DpoCacheError, match="was saved by 2 ranks and could not be converted") as caught:
        convert_checkpoint(checkpoint, tmp_path / "converted")
    # torch names no full disk: "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598".
    assert str(caught.value.next_step).startswith("if the disk is full (df -h)")
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


def _engine(folder: str, stage: int, dtype: str, *, load_universal: bool = False) -> PolicyEngine:
    num_ranks = dist.get_world_size()
    return make_engine(Path(folder), zero_stage=stage, num_ranks=num_ranks, dtype=dtype, load_universal=load_universal)


def _train(engine: PolicyEngine, first: int, last: int) -> list[tuple[float, float]]:
    return [
        train_steps(engine, [BATCHES[step]], learning_rate=1e-3 * (step + 1), micro_steps=2)[0]
        for step in range(first, last)
    ]


def save_and_go_on(folder: str, cases: list[tuple[int, str]]) -> list[Any]:
    """Three steps, a checkpoint, two more steps; and the two more steps by an engine that loads the checkpoint."""
    results = []
    for stage, dtype in cases:
        path = Path(folder) / f"{stage}_{dtype}"
        engine = _engine(folder, stage, dtype)
        _train(engine, 0, 3)
        state = TrainerState(step=3, num_ranks=dist.get_world_size(), zero_stage=stage, run=RUN)
        checkpoint = open_checkpoint(save_checkpoint(engine, path, state, keep_last=1))
        straight = (_train(engine, 3, 5), trained_weights(engine))
        resumed_engine = _engine(folder, stage, dtype)
        load_checkpoint(resumed_engine, checkpoint)
        results.append((straight, (_train(resumed_engine, 3, 5), trained_weights(resumed_engine))))
    return results


def go_on_with_other_ranks(folder: str, cases: list[tuple[int, str]]) -> list[Any]:
    results = []
    for stage, dtype in cases:
        path = Path(folder) / f"{stage}_{dtype}"
        checkpoint = newest_checkpoint(path)
        assert checkpoint is not None
        converted = path / "universal" if needs_conversion(checkpoint, num_ranks=dist.get_world_size()) else None
        if converted is not None and dist.get_rank() == 0:
            convert_checkpoint(checkpoint, converted)
        dist.barrier()
        engine = _engine(folder, stage, dtype, load_universal=converted is not None)
        load_checkpoint(engine, checkpoint, converted=converted)
        results.append((_train(engine, 3, 5), trained_weights(engine)))
    return results


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "cases"), [(2, 1, CASES), (1, 2, [(0, "float32"), (2, "float32"), (3, "bfloat16")])]
)
def test_resuming_is_exact_and_works_on_another_number_of_ranks(
    tmp_path: Path, saved_by: int, resumed_by: int, cases: list[tuple[int, str]]
) -> None:
    folder = tmp_path / "beta[5]+lora"  # which DeepSpeed would take for a pattern
    folder.mkdir()
    of_ranks = run_ranks(save_and_go_on, str(folder), cases, num_ranks=saved_by)
    for of_rank in of_ranks:
        for case, (straight, resumed) in zip(cases, of_rank, strict=True):
            assert resumed == straight, case
    for of_rank in run_ranks(go_on_with_other_ranks, str(folder), cases, num_ranks=resumed_by):
        for (stage, dtype), (straight, _), (figures, weights) in zip(cases, of_ranks[0], of_rank, strict=True):
            tolerance = 2e-5 if dtype == "float32" else 2e-2
            for found, wanted in zip(figures, straight[0], strict=True):
                assert found == pytest.approx(wanted, rel=tolerance), (stage, dtype)
            assert weights == pytest.approx(straight[1], abs=tolerance), (stage, dtype)

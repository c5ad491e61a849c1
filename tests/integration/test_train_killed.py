"""SIGKILL at any moment of a run, also while it saves: what is resumed equals what was never stopped."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from commands import dpo_train, ended, kill_when, metrics, run
from safetensors.torch import load_file

STEPS = 12
FIELDS = ("train_loss", "rewards/margin", "logps/chosen", "grad_norm", "learning_rate", "epoch")


class RandomlyAfter:
    """True from some time after a number of updates has been logged."""

    def __init__(self, output: Path, updates: int, *, seconds: float) -> None:
        self._log, self._updates, self._seconds = output / "metrics.jsonl", updates, seconds
        self._moment: float | None = None

    def __call__(self) -> bool:
        if self._moment is None:
            if self._log.exists() and self._log.read_bytes().count(b"train_loss") >= self._updates:
                self._moment = time.monotonic() + self._seconds
            return False
        return time.monotonic() >= self._moment


def kill_while_saving(command: list[str], output: Path, *, step: int) -> None:
    """A save takes some milliseconds: a try that comes too late begins again from nothing."""
    half_saved = output / "checkpoints" / f"step_{step}"
    for _ in range(10):
        assert kill_when(command, half_saved.exists, interval_s=0.001)
        if not (half_saved / "COMPLETE").exists():
            return
        shutil.rmtree(output)
    pytest.fail("no kill came in the middle of a save")


def test_a_run_killed_while_saving_and_at_random_moments_equals_one_never_stopped(
    shared_cache: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--max-steps", STEPS, "--checkpointing-steps", 2, "--keep-last-n-checkpoints", 2)
    recipe = ("--cache", shared_cache, "--global-batch-size", 8, "--learning-rate", 1e-3, *options)
    run(dpo_train(*recipe, "--output", whole))
    command = dpo_train(*recipe, "--output", killed, "--resume")

    kill_while_saving(command, killed, step=4)
    generator = random.Random(0)
    for updates in (5, 9):
        kill_when(command, RandomlyAfter(killed, updates, seconds=generator.uniform(0.0, 0.5)))
    finished = ended(command)
    assert finished.returncode == 0, finished.stderr[-3000:]

    straight, resumed = metrics(whole), metrics(killed)
    assert [line["training_step"] for line in resumed] == list(range(1, STEPS + 1))
    for ours, theirs in zip(resumed, straight, strict=True):
        for field in FIELDS:
            assert ours[field] == pytest.approx(theirs[field], rel=1e-9), (ours["training_step"], field)
    after, expected = (load_file(folder / "model/model.safetensors") for folder in (killed, whole))
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=0)

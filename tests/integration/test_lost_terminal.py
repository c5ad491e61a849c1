"""Who reads what a command says may go away, be full or never have been there: the work goes on, or saves."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from commands import dpo_cache, dpo_train


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_training_whose_reader_died_of_the_same_signal_saves_a_checkpoint(
    shared_cache: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """Ctrl-C reaches ``dpo-train … 2>&1 | tee log`` as a whole; a connection that drops takes the terminal with it."""
    reading, writing = os.pipe()
    recipe = ("--global-batch-size", 2, "--max-steps", 10_000, "--warmup-ratio", 0)
    command = dpo_train("--cache", shared_cache, "--output", tmp_path / "run", *recipe)
    with subprocess.Popen(command, stdout=writing, stderr=writing, start_new_session=True) as training:
        os.close(writing)
        said = b""
        while b"update 1, with learning rate" not in said:
            more = os.read(reading, 65_536)
            assert more, said.decode()
            said += more
        os.close(reading)
        training.send_signal(signum)
        assert training.wait(timeout=120) == 1
    assert list((tmp_path / "run/checkpoints").glob("step_*/COMPLETE"))


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_command_whose_standard_error_is_closed_or_full_does_its_work(cache: Path, stderr: str) -> None:
    command = f"{shlex.join(dpo_cache('verify', cache))} {stderr}"
    verified = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, check=False)
    assert verified.returncode == 0
    assert "nothing is wrong" in verified.stdout

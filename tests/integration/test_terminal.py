"""What a command leaves on a terminal, where its bar is drawn over and over."""

from __future__ import annotations

import os
import subprocess
import termios
from pathlib import Path

from commands import dpo_train
from terminal_screen import screen


def test_the_fault_that_ends_a_training_stands_below_its_bar_and_last(shared_cache: Path, tmp_path: Path) -> None:
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    diverging = ("--learning-rate", 1e30, "--warmup-ratio", 0, "--lr-scheduler-type", "constant")
    command = dpo_train("--cache", shared_cache, "--output", tmp_path / "run", "--global-batch-size", 2, *diverging)
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal) as training:
        os.close(terminal)
        lines = screen(_all_written_to(master))
        assert training.wait(timeout=60) == 1
    bar, fault = (
        next(number for number, line in enumerate(lines) if line.startswith(beginning))
        for beginning in ("train: ", "Error: the loss of step 2 is not finite")
    )
    assert bar < fault
    assert not any("train: " in line for line in lines[fault:])
    assert any(line.startswith("update 1, with learning rate") for line in lines[:bar])


def _all_written_to(master: int) -> str:
    written = b""
    while True:
        try:
            more = os.read(master, 65_536)
        except OSError:  # nobody has the terminal open any more
            os.close(master)
            return written.decode()
        written += more

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable

import pytest
from dpo_cache.stages.console import progress
from dpo_cache.stages.console.logged_warnings import say_logged_warnings
from dpo_cache.stages.console.progress import Progress
from dpo_cache.stages.console.terminal import say
from terminal_screen import TerminalText, screen


def test_in_a_log_file_every_state_is_a_line_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    with Progress(100, unit="step", title="train", done_before=40) as bar:
        for done in range(41, 60):
            bar.reach(done, loss="0.5", GiB="1.2")
        say("saved")
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert "saved" in lines
    last = lines[-1]
    assert last.startswith("train:  59%")
    assert "59/100" in last
    assert "<" in last
    assert "step/s, loss=0.5, GiB=1.2]" in last


def test_where_the_notes_hold_the_rate_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(1000, unit="step", title="train", notes_hold_rate=True) as bar:
        bar.reach(12, **{"tok/s": "1,500"})
    assert log.getvalue().splitlines()[-1].endswith(", tok/s=1,500]")
    assert "step/s" not in log.getvalue()


@pytest.mark.parametrize("tell", [say, logging.getLogger("dpo_cache.pipeline.training.run_log").warning])
def test_on_a_terminal_a_message_stands_above_the_bar(
    monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    say_logged_warnings()
    say_logged_warnings()  # a command within a process that has run another
    terminal = TerminalText()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(1000, unit="step", title="train") as bar:
        bar.reach(12)
        tell("saved")
        shown = screen(terminal.getvalue())
    assert shown[0] == "saved"
    assert shown[1].startswith("train:   1%")

"""A request to stop waits until the work asks for it, and a second Ctrl-C does not."""

from __future__ import annotations

import os
import signal

import pytest
from dpo_cache.stages.processes.stop_request import STDERR, stop_requests


def test_the_first_request_is_answered_with_the_notice_and_a_ctrl_c_after_it_ends_the_work(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stop_requests(notice="wait, or ask again") as stop_requested:
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "\nwait, or ask again\n"


def test_a_lost_terminal_is_a_first_request_never_a_second(capfd: pytest.CaptureFixture[str]) -> None:
    """Kernel and shell each send a SIGHUP."""
    with stop_requests() as stop_requested:
        signal.raise_signal(signal.SIGHUP)
        assert stop_requested()
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_requests() as stop_requested:
            signal.raise_signal(signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_is_heard_where_its_notice_is_not() -> None:
    """The Ctrl-C that stops a run also ends the ``tee`` that the run writes to."""
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.dup(STDERR)
    os.dup2(writing, STDERR)
    os.close(writing)
    try:
        with stop_requests(notice="wait") as stop_requested:
            signal.raise_signal(signal.SIGINT)
            assert stop_requested()
    finally:
        os.dup2(stderr, STDERR)
        os.close(stderr)


def test_a_request_that_also_comes_from_the_process_that_passes_it_on_is_one_request(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stop_requests(notice="wait, or ask again") as stop_requested:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
    assert capfd.readouterr().err == "\nwait, or ask again\n"

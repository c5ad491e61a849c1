"""A request to stop waits until the work asks for it, and a second one does not."""

from __future__ import annotations

import signal

import pytest
from dpo_cache.stages.processes.stop_request import stop_requests


def test_the_first_request_is_answered_with_the_notice_and_the_second_ends_the_work(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with stop_requests(notice="wait, or ask again") as stop_requested:
        assert not stop_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "\nwait, or ask again\n"

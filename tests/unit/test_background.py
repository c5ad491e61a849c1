"""Items arrive in order from another thread, faults reach the thread that can act on them, and nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from dpo_cache.stages.processes.background import READ_AHEAD, ReadAhead, WriteBehind


def test_items_come_in_order_and_only_a_few_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    with ReadAhead(items()) as waiting:
        assert next(waiting) == 0
        time.sleep(0.1)
        assert len(made) <= READ_AHEAD + 2
        assert list(waiting) == list(range(1, 10))


def test_a_fault_of_the_reader_is_raised_where_its_items_are_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"), ReadAhead(items()) as waiting:
        assert list(waiting) == [1]


def test_leaving_early_ends_a_reader_that_waits() -> None:
    stop = threading.Event()
    woken: list[bool] = []

    def items() -> Iterator[int]:
        yield 1
        woken.append(stop.wait(30))

    with ReadAhead(items(), on_stop=stop.set) as waiting:
        assert next(waiting) == 1
    assert woken == [True]


def test_one_write_is_in_flight_and_all_are_done_at_the_end() -> None:
    written: list[int] = []
    may_write = threading.Event()

    def write(number: int) -> None:
        may_write.wait(30)
        written.append(number)

    with WriteBehind() as writer:
        writer.submit(lambda: write(1))
        assert written == []  # the driving thread goes on meanwhile
        may_write.set()
        writer.submit(lambda: write(2))
        assert written[0] == 1
    assert written == [1, 2]


def test_a_fault_of_the_writer_wakes_whoever_waits_and_is_raised() -> None:
    stop = threading.Event()
    woken: list[bool] = []

    def items() -> Iterator[int]:
        yield 1
        woken.append(stop.wait(30))  # as units of other workers are waited for

    def write() -> None:
        raise OSError("disk full")

    def score() -> None:
        with WriteBehind(on_fault=stop.set) as writer, ReadAhead(items(), on_stop=stop.set) as waiting:
            for _ in waiting:
                writer.submit(write)

    with pytest.raises(OSError, match="disk full"):
        score()
    assert woken == [True]

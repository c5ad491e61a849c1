"""Warnings that code below the stages logs, said to the person at the terminal as what the stages say is."""

from __future__ import annotations

import logging


class _SayingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from .terminal import say  # only now: it takes a while to import

        say(self.format(record))


def say_logged_warnings() -> None:
    """From now on warnings of this package stand above a bar, not behind it, and are printable."""
    ours = logging.getLogger(__name__.partition(".")[0])
    if not any(isinstance(handler, _SayingHandler) for handler in ours.handlers):
        ours.addHandler(_SayingHandler(logging.WARNING))

"""Progress of long work on stderr: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LOG_INTERVAL_S = 30.0
MAX_TITLE = 32
WITHOUT_RATE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Rate, ETA and whatever else is worth a glance.

    Args:
        total: How much there is to do, in ``unit``.
        unit: What is counted.
        title: What is being done.
        done_before: How much of it an earlier process did.
        notes_hold_rate: Whether the notes say how quick it is, in a better unit.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        title: str,
        done_before: int = 0,
        notes_hold_rate: bool = False,
    ) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done_before,
            unit=unit,
            unit_scale=unit in ("tok", "B"),
            desc=_short(title),
            file=sys.stderr if terminal else _LogLines(sys.stderr),
            mininterval=0.2 if terminal else LOG_INTERVAL_S,
            dynamic_ncols=terminal,
            bar_format=WITHOUT_RATE if notes_hold_rate else None,
        )

    def reach(self, done: int, **notes: object) -> None:
        """Set how much is done by now, and the notes beside the bar."""
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave it standing as it is."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _LogLines:
    """A log file as tqdm's terminal: each state of the bar is a line of its own, none is drawn over another."""

    def __init__(self, log: TextIO) -> None:
        self._log = log

    def write(self, text: str) -> None:
        for state in text.replace("\r", "\n").splitlines():
            if state.strip():
                self._log.write(state.rstrip() + "\n")

    def flush(self) -> None:
        self._log.flush()


def _short(title: str) -> str:
    """A title that leaves room for the bar; of a long path the end tells most."""
    return title if len(title) <= MAX_TITLE else f"{title[:10]}…{title[11 - MAX_TITLE :]}"

"""What a command leaves on the terminal: its report on stdout, a fault in words on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import click

from .errors import DpoCacheError
from .stages.processes.ranks import ranks_from_environment

REFUSED_BY_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
}
"""What no code can fix: a full disk, a missing permission, a name that is too long. The message names the file."""


class Report(Protocol):
    """What a stage says, for people and for programs."""

    def text(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@contextlib.contextmanager
def faults_explained(*, to_go_on: str = "the same command continues from there") -> Iterator[None]:
    """Turn a fault that the user can fix into its message and exit code 1, without a traceback; with ``--json`` also
    into an object ``error`` on stdout.
    """
    try:
        with _sigterm_as_ctrl_c():
            yield
    except DpoCacheError as fault:
        _tell(f"Error: {fault}", {"found": fault.found, "expected": fault.expected, "next_step": fault.next_step})
        sys.exit(1)
    except OSError as refused:
        if refused.errno not in REFUSED_BY_THE_MACHINE:
            raise
        _tell(f"Error: {refused}", {"found": str(refused)})
        sys.exit(1)
    except KeyboardInterrupt:
        _tell(f"Stopped. Finished work is kept; {to_go_on}.", {"found": "stopped", "next_step": to_go_on})
        sys.exit(1)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A scheduler's request to stop ends a command as Ctrl-C does, so that its temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stdout_for_reports() -> contextlib.redirect_stdout[Any]:
    """Send what libraries print to stderr while they work, some of it as early as their import."""
    return contextlib.redirect_stdout(sys.stderr)


def print_report(report: Report, as_json: bool) -> None:
    """What a command was asked for goes to stdout; colours only to a terminal."""
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.text())


def print_summary(summary: str, as_json: Mapping[str, Any] | None) -> None:
    """The closing lines of a command that does work: to stderr; stdout is left to the JSON object, if any."""
    click.echo(summary, err=True)
    if as_json is not None:
        click.echo(json.dumps(as_json, indent=2))


def _tell(message: str, error: Mapping[str, str | None]) -> None:
    """Print a fault; a process with a launcher leaves it to the launcher, which prints each message once."""
    fault_file = os.environ.get("DPO_CACHE_FAULT_FILE")
    if fault_file is not None:
        Path(fault_file).write_text(message, encoding="utf-8")
        return
    click.echo(message, err=True)
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("as_json") and _speaks_for_the_job():
        click.echo(json.dumps({"error": error}, indent=2))


def _speaks_for_the_job() -> bool:
    """Of the ranks that a launcher started the first one alone, so that stdout holds one object."""
    try:
        ranks = ranks_from_environment()
    except DpoCacheError:  # the very fault that is told
        return True
    return ranks is None or ranks.rank == 0

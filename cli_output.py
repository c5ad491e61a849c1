"""What a command leaves on the terminal: its report on stdout, a fault in words on stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import click

from .errors import DpoCacheError, first_line
from .pipeline.data.printable_text import printable
from .pipeline.finite_json import finite_json
from .stages.console.logged_warnings import say_logged_warnings
from .stages.console.unfailing_stderr import make_stderr_unfailing
from .stages.processes.child_processes import leave_fault
from .stages.processes.ranks import ranks_from_environment
from .stages.processes.stop_request import handled_by, signals_to_stop

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
def command_run(*, to_go_on: str | None = None) -> Iterator[None]:
    """The work of a command: libraries' prints, some as early as their import, go to stderr.

    A fault that the user can fix ends in its message and exit code 1, without a traceback; with ``--json`` also in an
    object ``error`` on stdout.

    Args:
        to_go_on: How to continue once it was stopped; None for a command that starts over.
    """
    make_stderr_unfailing()
    say_logged_warnings()
    try:
        with contextlib.redirect_stdout(sys.stderr), _stopped_as_by_ctrl_c():
            yield
    except DpoCacheError as fault:
        _tell(fault)
        sys.exit(1)
    except OSError as refused:
        explained = _fault_of_the_machine(refused)
        if explained is None:
            raise
        _tell(explained)
        sys.exit(1)
    except KeyboardInterrupt:
        stopped = f"Stopped. Finished work is kept; {to_go_on}." if to_go_on else "Stopped."
        _tell(DpoCacheError(stopped), in_json=DpoCacheError("stopped", next_step=to_go_on), prefix="")
        sys.exit(1)


def _fault_of_the_machine(error: OSError) -> DpoCacheError | None:
    """In words, what no code can fix; None where it is ours to fix."""
    if error.errno in REFUSED_BY_THE_MACHINE:
        return DpoCacheError(str(error))
    try:
        tempfile.gettempdir()
    except FileNotFoundError as nowhere:  # a container whose file systems are all read-only
        return DpoCacheError(first_line(nowhere), next_step="set TMPDIR to a folder that this user may write to")
    return None


@contextlib.contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """A scheduler or a lost terminal ends a command as Ctrl-C does, so that its temporary files are removed."""
    with handled_by(_interrupt, [signum for signum in signals_to_stop() if signum != signal.SIGINT]):
        yield


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    # It may come twice, and the second must not disturb what the first began: kernel and shell each send a SIGHUP, and
    # `timeout` sends a SIGTERM to the process and one to its group.
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_report(report: Report, as_json: bool, *, coloured: bool = False) -> None:
    """What a command was asked for goes to stdout; colours only to a terminal.

    Args:
        report: What to print.
        as_json: As an object, not for people.
        coloured: Whether its text has colours. Such a report removes control characters from strangers' text itself.
    """
    if as_json:
        click.echo(finite_json(report.to_json(), indent=2))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal without UTF-8 has no letters for is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    click.echo(report.text() if coloured else printable(report.text()))


def print_summary(summary: str, as_json: Mapping[str, Any] | None) -> None:
    """The closing lines of a command that does work: to stderr; stdout is left to the JSON object, if any."""
    click.echo(printable(summary), err=True)
    if as_json is not None:
        click.echo(finite_json(as_json, indent=2))


def _tell(fault: DpoCacheError, *, in_json: DpoCacheError | None = None, prefix: str = "Error: ") -> None:
    """Print a fault, unless the process that started this one prints it for all of its children."""
    if leave_fault(fault):
        return
    click.echo(printable(f"{prefix}{fault}"), err=True)
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("as_json") and _speaks_for_the_job():
        click.echo(finite_json({"error": (in_json or fault).to_json()}, indent=2))


def _speaks_for_the_job() -> bool:
    """Of the ranks that a launcher started the first one alone, so that stdout holds one object."""
    try:
        ranks = ranks_from_environment()
    except DpoCacheError:  # the very fault that is told
        return True
    return ranks is None or ranks.rank == 0

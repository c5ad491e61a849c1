"""Look over the machine and the installation, and say what to do about what is wrong."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .machine.doctor_devices import examine_devices
from .machine.doctor_machine import examine_machine
from .machine.doctor_services import examine_services
from .machine.doctor_software import examine_software
from .machine.finding import Finding, Level

MARKS = {Level.OK: "ok", Level.NOTE: "note", Level.WARNING: "warn", Level.FATAL: "FAIL"}
COLOURS = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.FATAL: "red"}
WIDTH = 80
INDENT = 27


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorReport:
    """Everything that was looked at, in the order of the sections."""

    findings: list[Finding]

    @property
    def can_run(self) -> bool:
        """Whether both commands can run here."""
        return not any(finding.level is Level.FATAL for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {"can_run": self.can_run, "findings": [asdict(finding) for finding in self.findings]}

    def text(self) -> str:
        """For an 80-column terminal."""
        lines: list[str] = []
        section = None
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines += ["", click.style(section, bold=True)]
            lines += _lines_of(finding)
        return "\n".join([*lines[1:], "", self._verdict()])

    def _verdict(self) -> str:
        fatal = self._names(Level.FATAL)
        if fatal:
            return click.style(f"dpo-cache build or dpo-train cannot run here because of: {fatal}", fg="red")
        warnings = self._names(Level.WARNING)
        return "both commands can run here" + (f"; worth a look: {warnings}" if warnings else "")

    def _names(self, level: Level) -> str:
        return ", ".join(finding.name for finding in self.findings if finding.level is level)


def examine(folder: Path) -> DoctorReport:
    """Look at everything; takes a few seconds, most of them for importing libraries and for the network.

    Args:
        folder: Where caches and runs would be written.
    """
    return DoctorReport(
        findings=[*examine_software(), *examine_devices(), *examine_machine(folder), *examine_services()]
    )


def _lines_of(finding: Finding) -> list[str]:
    mark = click.style(f"{MARKS[finding.level]:<4}", fg=COLOURS[finding.level])
    lines = textwrap.wrap(finding.value, WIDTH - INDENT)
    if finding.advice is not None:
        lines += textwrap.wrap(f"-> {finding.advice}", WIDTH - INDENT, subsequent_indent="   ")
    return [
        f"  {mark}  {finding.name:<{INDENT - 10}}  {lines[0]}",
        *(" " * INDENT + line for line in lines[1:]),
    ]

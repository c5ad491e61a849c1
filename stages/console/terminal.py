"""Words for the person at the terminal, while work goes on."""

from __future__ import annotations

import click

from ...pipeline.data.printable_text import printable


def say(message: str) -> None:
    """Print a line to stderr: stdout is for what a command was asked for."""
    click.echo(printable(message), err=True)  # it may quote a cache that a stranger made

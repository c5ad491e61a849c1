"""Words for the person at the terminal, while work goes on."""

from __future__ import annotations

import click


def say(message: str) -> None:
    """Print a line to stderr: stdout is for what a command was asked for."""
    click.echo(message, err=True)

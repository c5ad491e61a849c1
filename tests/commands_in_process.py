"""Run the commands of ``dpo-cache`` in this process, which is quicker where a process of its own is not the point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from dpo_cache.cli import dpo_cache


def invoke(*arguments: str | Path | int, answer: str | None = None, color: bool = False) -> Result:
    """A command, run to its end; nothing but an exit may be raised."""
    result = CliRunner().invoke(dpo_cache, [str(argument) for argument in arguments], input=answer, color=color)
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    return result


def report(*arguments: str | Path | int, exit_code: int = 0) -> dict[str, Any]:
    """The ``--json`` report of a command."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def refusal(*arguments: str | Path | int) -> str:
    """The message of a command that is to fail."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    return result.stderr[result.stderr.rindex("Error: ") :]

"""Write ``docs/cli.md``: what ``--help`` says, for every command of every console script.

python scripts/docs/command_reference.py
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cli.md"
WIDTH = 100
INTRODUCTION = """# Commands

What `--help` prints. Options of commands that take `--config FILE.yaml` can also be set in that file, under their names
without the leading dashes; flags override the file. The exit code is 0 on success, 1 after an error or an interruption,
and 2 for an invalid command line. `--json` prints one object on stdout; everything else goes to stderr. After an error
the object is `{"error": {"found": …, "expected": …, "next_step": …}}`; an invalid command line leaves stdout empty.
(`verify`, `doctor` and `dpo-sweep` print their ordinary report and exit with 1 if it contains a failure.)
"""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that a user may type, with its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for script, target in project["scripts"].items():
        module, _, attribute = target.partition(":")
        yield from _with_subcommands(script, getattr(import_module(module), attribute))


def reference() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(
        f"\n## {name}\n\n```text\n{_help(name, command)}\n```\n" for name, command in commands()
    )


def _with_subcommands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for subcommand in sorted(command.commands):
            if not command.commands[subcommand].hidden:
                yield from _with_subcommands(f"{name} {subcommand}", command.commands[subcommand])


def _help(name: str, command: click.Command) -> str:
    # A width of its own: the page must not depend on the terminal that wrote it.
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    return click.unstyle(command.get_help(context))


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")

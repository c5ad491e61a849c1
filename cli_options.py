"""A stage's settings as click options, and a YAML file of the same names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import click

from .cli_completion import complete_mixture
from .cli_help import GroupedOption
from .cli_location import FOLDER, LOCATION
from .errors import DpoCacheError
from .stages.setting import Setting, settings_of, values_from_file

MIXTURES = ("mixture", "eval_mixture")

Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(
    config_class: type[Any], *, without: Collection[str] = (), from_file: bool = True, whole_file: bool = False
) -> Callable[[Command], Command]:
    """Every setting of a stage but those ``without`` as an option, and ``--config`` for a YAML file of them.

    Args:
        config_class: The settings.
        without: Names of those that are no options of this command.
        from_file: Whether there is ``--config``.
        whole_file: Whether that file may have them nevertheless, because it serves another command too.
    """

    def decorate(command: Command) -> Command:
        for declared in reversed(list(settings_of(config_class))):
            if declared.name not in without:
                command = _option_of(declared)(command)
        if not from_file:
            return command
        return click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            multiple=True,  # only so that a second one can be refused
            is_eager=True,
            expose_value=False,
            callback=functools.partial(_read_config_file, config_class, frozenset(without), whole_file),
            help="YAML file with these options as keys. Flags override it; --no-NAME turns a switch off again.",
        )(command)

    return decorate


def _option_of(declared: Setting) -> Callable[[Command], Command]:
    description = declared.description
    shown: dict[str, Any] = {"cls": GroupedOption, "group": description.group, "default_text": description.default_text}
    required = declared.default is MISSING
    if declared.value_type is bool:
        # Both forms, so that the command line can overrule the file either way.
        flags = f"{declared.flag}/--no-{declared.flag.removeprefix('--')}"
        return click.option(flags, declared.name, default=declared.default, help=description.help, **shown)
    attributes: dict[str, Any] = {}
    if description.flag_value is not None:
        attributes = {"is_flag": False, "flag_value": description.flag_value}
    return click.option(
        declared.flag,
        declared.name,
        type=_click_type(declared),
        **({"required": True} if required else {"default": declared.default}),  # a default of None would count as given
        multiple=declared.repeats,
        show_default=not required and declared.default not in (None, ()),
        help=description.help,
        metavar=description.metavar,
        shell_complete=complete_mixture if declared.name in MIXTURES else None,
        **shown,
        **attributes,
    )


def _click_type(declared: Setting) -> Any:
    if declared.description.choices is not None:
        return click.Choice(declared.description.choices)
    if declared.is_location:
        return LOCATION
    return FOLDER if declared.value_type is Path else declared.value_type


def _read_config_file(
    config_class: type[Any],
    without: Collection[str],
    whole_file: bool,
    context: click.Context,
    _parameter: click.Parameter,
    paths: tuple[Path, ...],
) -> None:
    """Make the file's values the defaults of this command; an unknown key is an error."""
    if not paths:
        return
    if len(paths) > 1:
        raise click.BadParameter(
            f"it is given {len(paths)} times ({', '.join(map(str, paths))}), and one file would replace the other: "
            "put all options into one file, or give some as flags"
        )
    (path,) = paths
    from .stages.options_file import read_options_file

    try:
        values = read_options_file(path) or {}
    except DpoCacheError as fault:
        raise click.BadParameter(str(fault)) from fault
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} does not hold option names with values")
    try:
        given = values_from_file(config_class, values)
    except DpoCacheError as fault:
        raise click.BadParameter(f"{path}: {fault}") from fault
    strange = sorted(given.keys() & without)
    if strange and not whole_file:
        raise click.BadParameter(f"{path}: unknown option {strange[0]}")
    context.default_map = {name: value for name, value in given.items() if name not in without}

"""One declaration for a setting: its default, its help text and its limits.

The dataclass of a stage is the single source of its options: the command line, the YAML file and the child
processes are all derived from it, so none can drift from the others.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError
from .addresses.location import Location, location_of
from .names_elsewhere import instead_of


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingDescription:
    """What the command line says and checks about one setting.

    Attributes:
        help: A sentence or two for ``--help``, with the unit.
        group: The heading it stands under there.
        default_text: The default in words, where the field's own default (None, as a rule) does not say it.
        choices: The only values accepted, where there is such a list.
        minimum: Smallest value accepted.
        above: The value must be larger than this.
        maximum: Largest value accepted.
        below: The value must be smaller than this.
        flag_value: What the bare flag means, where the value may be left out (``--resume``).
        metavar: How the value is called in ``--help``.
    """

    help: str
    group: str = "Options"
    default_text: str | None = None
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    flag_value: str | None = None
    metavar: str | None = None


def setting(default: Any = MISSING, *, help: str, **limits: Any) -> Any:
    """Declare a dataclass field that is also an option. ``partial(setting, group=…)`` declares those of one group.

    Args:
        default: The default; without one the option is required.
        help: A sentence or two for ``--help``.
        **limits: The other attributes of :class:`SettingDescription`.
    """
    metadata = {"setting": SettingDescription(help=help, **limits)}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of a stage, as read from its dataclass.

    Attributes:
        name: The field's name, ``max_seq_length``.
        value_type: ``str``, ``int``, ``float``, ``bool`` or ``Path``; of the elements, where it repeats.
        is_location: A path that may also be an address, which stays text.
        repeats: The option may be given several times; the value is a tuple.
        default: The default, or ``dataclasses.MISSING`` where it is required.
        description: Help and limits.
    """

    name: str
    value_type: type
    is_location: bool
    repeats: bool
    default: Any
    description: SettingDescription

    @property
    def flag(self) -> str:
        """The option on the command line, ``--max-seq-length``."""
        return _flag(self.name)


def settings_of(config_class: type[Any]) -> Iterator[Setting]:
    """The settings of a stage's config class, in the order they are declared."""
    hints = typing.get_type_hints(config_class)
    for config_field in fields(config_class):
        value_type, repeats = _element_type(hints[config_field.name])
        yield Setting(
            name=config_field.name,
            value_type=value_type,
            is_location=hints[config_field.name] == Location,
            repeats=repeats,
            default=config_field.default,
            description=config_field.metadata["setting"],
        )


def check_settings(config: Any) -> None:
    """Check every value of ``config`` against its declared choices and limits.

    Raises:
        DpoCacheError: Naming the flag, the value found and what is accepted.
    """
    for declared in settings_of(type(config)):
        value = getattr(config, declared.name)
        for element in value if declared.repeats else (value,):
            _check_value(declared, element)


def refuse_ignored(config: Any, *names: str, without: str, is_given: bool) -> None:
    """Refuse settings that would be ignored, because the option that gives them a meaning is not given.

    Args:
        config: The settings.
        names: Those that have no meaning of their own. One at its default counts as left out.
        without: The option that they need, as it is typed.
        is_given: Whether that one is given.

    Raises:
        DpoCacheError: Naming both options.
    """
    defaults = {config_field.name: config_field.default for config_field in fields(config)}
    ignored = [_flag(name, getattr(config, name)) for name in names if getattr(config, name) != defaults[name]]
    if ignored and not is_given:
        raise DpoCacheError(
            f"{ignored[0]} has no effect without {without}", next_step=f"add {without}, or leave out {ignored[0]}"
        )


def command_line_of(config: Any) -> list[str]:
    """The arguments that give ``config`` back: how a stage tells its child processes what to do."""
    arguments: list[str] = []
    for declared in settings_of(type(config)):
        value = getattr(config, declared.name)
        if value == declared.default or value is None:
            continue
        if declared.value_type is bool:
            arguments.append(_flag(declared.name, value))
            continue
        for element in value if declared.repeats else (value,):
            arguments.append(f"{declared.flag}={element}")
    return arguments


def values_from_file(config_class: type[Any], given: Mapping[Any, Any]) -> dict[str, Any]:
    """Bring what a YAML file gives to the names, the types and the order of the settings; dashes and underscores are
    alike.

    Raises:
        DpoCacheError: A name that is not a setting, or a value that is not of the setting's type.
    """
    declared = {one.name: one for one in settings_of(config_class)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            similar = f"did you mean {near[0].replace('_', '-')}?" if near else None
            raise DpoCacheError(f"unknown option {key}", next_step=instead_of(name) or similar)
        if name in values:
            raise DpoCacheError(f"{key} is given twice", next_step="leave out one of the two spellings")
        values[name] = _value_from_file(declared[name], value)
    return {name: values[name] for name in declared if name in values}


def _flag(name: str, value: Any = None) -> str:
    """An option as it is typed to give it a value; to turn a switch off, ``--no-hub-private``."""
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def _value_from_file(declared: Setting, value: Any) -> Any:
    if value is None and declared.default is not MISSING:
        return declared.default
    if value is True and declared.description.flag_value is not None:
        return declared.description.flag_value  # `resume: true`, as the bare flag
    if not declared.repeats:
        return _element_from_file(declared, value)
    return tuple(_element_from_file(declared, element) for element in (value if isinstance(value, list) else [value]))


def _element_from_file(declared: Setting, value: Any) -> Any:
    """YAML reads ``1e-6`` as text, so text is accepted where it spells a number, and a number where text is wanted."""
    if declared.is_location and isinstance(value, str):
        return location_of(value)
    wanted = declared.value_type
    is_plain = isinstance(value, str | int | float) and (wanted is bool) == isinstance(value, bool)
    if is_plain and not (wanted is int and isinstance(value, float)):
        try:
            return Path(str(value)) if wanted is Path else wanted(value)
        except ValueError:
            pass
    raise DpoCacheError(f"{declared.flag} is {value!r}", expected=_KINDS[wanted])


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def _element_type(hint: Any) -> tuple[type, bool]:
    """``int | None`` is an optional int; ``tuple[str, ...]`` a repeated str."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if typing.get_origin(hint) is typing.Literal:
        return str, False
    if hint == Location:
        return Path, False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    assert hint in (str, int, float, bool, Path), f"no command-line form for {hint}"
    return hint, False


def _check_value(declared: Setting, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise DpoCacheError(f"{declared.flag} is {value}", expected="a finite number")
    limits = declared.description
    if limits.choices is not None and value not in limits.choices:
        raise DpoCacheError(f"{declared.flag} is {value!r}", expected=_one_of(limits.choices))
    if limits.minimum is not None and not value >= limits.minimum:
        raise DpoCacheError(f"{declared.flag} is {value}", expected=f"{limits.minimum} or more")
    if limits.above is not None and not value > limits.above:
        raise DpoCacheError(f"{declared.flag} is {value}", expected=f"more than {limits.above}")
    if limits.maximum is not None and not value <= limits.maximum:
        raise DpoCacheError(f"{declared.flag} is {value}", expected=f"{limits.maximum} or less")
    if limits.below is not None and not value < limits.below:
        raise DpoCacheError(f"{declared.flag} is {value}", expected=f"less than {limits.below}")


def _one_of(choices: Sequence[str]) -> str:
    return "one of " + ", ".join(choices)

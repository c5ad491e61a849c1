"""Whether a checkpoint belongs to the run that would resume from it: what its settings were, and what they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import DpoCacheError
from ..cache.message_value import message_value
from .checkpoint_folder import Checkpoint


def check_same_run(
    checkpoint: Checkpoint,
    *,
    run: Mapping[str, Any],
    zero_stage: int,
    causes: Callable[[str], Sequence[str]] = lambda _field: (),
) -> None:
    """Refuse to resume a run with other settings.

    Args:
        checkpoint: To resume from.
        run: The fingerprint of the run that would resume.
        zero_stage: Its ZeRO stage.
        causes: Why the field of this name differs, in words; nothing where only its values can be told.

    Raises:
        DpoCacheError: Naming the causes of each field that differs, or the field with both its values.
    """
    before = {**checkpoint.state.run, "zero_stage": checkpoint.state.zero_stage}
    now = {**run, "zero_stage": zero_stage}
    fields = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    different = [
        words
        for name in fields
        for words in causes(name) or changed_values({name: before.get(name)}, {name: now.get(name)})
    ]
    if different:
        settings = checkpoint.run_folder / "config.json"
        raise DpoCacheError(
            f"{checkpoint.path} belongs to another run: " + "; ".join(dict.fromkeys(different)),
            expected="what the run began with; what changes memory and speed alone may differ, except --zero-stage",
            next_step=f"give the old values, which are in {settings}, or start a new run in another --output",
        )


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of two starts of a run, in words, the fields in order of their names."""
    old, new = dict(_leaves("", before)), dict(_leaves("", now))
    return [
        f"{name} was {message_value(old.get(name))} and is {message_value(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each with its path: ``loss.losses.0.beta``."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(f"{name}.{key}" if name else str(key), item)

"""``config.json`` of a run's folder: what the run was begun with. It tells a run's folder from any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.training.run_file import write_run_json
from .recipe import Recipe
from .train_config import TrainConfig

if TYPE_CHECKING:  # it imports DeepSpeed, which a sweep must not do before the libraries are told to be quiet
    from .policy import PolicyOrigin

FILE = "config.json"


def write_run_config(
    config: TrainConfig, recipe: Recipe, origin: PolicyOrigin, *, fingerprint: Mapping[str, Any]
) -> None:
    """Leave the settings and the resolved numbers in the run's folder.

    Args:
        config: The settings.
        recipe: The resolved numbers.
        origin: What the policy starts from.
        fingerprint: What has to be the same for the run to be resumed.
    """
    settings = settings_to_record(config)
    resolved = {"policy": origin.model.name, "policy_is_reference": origin.is_reference, **recipe.to_json()}
    write_run_json(
        config.output / FILE, {"settings": settings, "resolved": resolved, "resume_fingerprint": fingerprint}
    )


def settings_to_record(config: TrainConfig) -> dict[str, Any]:
    """The settings as the folder keeps them."""
    given = asdict(config)
    if isinstance(config.cache, Path):
        given["cache"] = config.cache.absolute()  # a report is often made in another working folder
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def recorded_settings(output: Path) -> dict[str, Any]:
    """The settings of the run in the folder; empty where it recorded none."""
    settings = _read(output).get("settings")
    return settings if isinstance(settings, dict) else {}


def has_run_config(output: Path) -> bool:
    """Whether the folder has a ``config.json`` that a run wrote; models have a file of that name too."""
    config = _read(output)
    return isinstance(config.get("settings"), dict) and isinstance(config.get("resolved"), dict)


def recorded_fingerprint(output: Path) -> dict[str, Any]:
    """The fingerprint of the run in the folder; empty where it recorded none."""
    fingerprint = _read(output).get("resume_fingerprint")
    return fingerprint if isinstance(fingerprint, dict) else {}


def _read(output: Path) -> dict[str, Any]:
    try:
        config = json.loads((output / FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

"""What a user changed between two starts of a run, as options rather than as the numbers that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..setting import settings_of
from .run_config import recorded_fingerprint, recorded_settings, settings_to_record
from .train_config import TrainConfig

SETTINGS = {setting.name: setting for setting in settings_of(TrainConfig)}
LENGTH = ("num_train_epochs", "max_steps")
BATCH = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
OPTIONS_BEHIND = {
    "policy": ("model", "model_revision"),
    "mixture": ("mixture", "cache"),
    "reference": ("cache",),
    "loss": tuple(name for name, setting in SETTINGS.items() if setting.description.group == "Loss"),
    "lora": ("use_lora", "use_qlora", "lora_rank", "lora_alpha", "lora_target_modules"),
    "load_balancing_weight": ("load_balancing_loss", "load_balancing_weight"),
    "global_batch_size": BATCH,
    "total_steps": (*LENGTH, *BATCH, "mixture"),
    "warmup_steps": ("warmup_ratio", *LENGTH, *BATCH, "mixture"),
}
"""The options that decide what a checkpoint records under these names; each other name is that of its option."""
CONTENTS = {
    "policy": "the weights that the policy starts from have changed",
    "mixture": "the mixture has other pairs by now",
    "reference": "the cache belongs to another reference by now",
}
"""What has changed where no option has."""


def changed_options(output: Path, config: TrainConfig, field: str) -> list[str]:
    """Why a number of the run is another one now, in words; empty where that is not known.

    Args:
        output: The run's folder.
        config: The settings of this start.
        field: What a checkpoint calls the number.
    """
    before, now = recorded_settings(output), json.loads(json.dumps(settings_to_record(config)))
    changed = [
        f"{SETTINGS[name].flag} was {_in_words(before[name])} and is {_in_words(now[name])}"
        for name in OPTIONS_BEHIND.get(field, (field,))
        if name in SETTINGS and name in before and before[name] != now[name]
    ]
    if not changed and field == "global_batch_size" and (pairs := recorded_fingerprint(output).get(field)):
        return [
            f"the batch is given per GPU, and the number of GPUs has changed (--global-batch-size {pairs} keeps it)"
        ]
    return changed or ([CONTENTS[field]] if field in CONTENTS else [])


def _in_words(value: Any) -> str:
    if value is None or value is False or value == []:
        return "left out"
    if value is True:
        return "given"
    return f"{value:g}" if isinstance(value, float) else str(value)

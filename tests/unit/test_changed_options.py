"""A resumed run that does not fit is told which options were changed, not which numbers follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo_cache.pipeline.training.run_file import write_run_json
from dpo_cache.stages.training.changed_options import OPTIONS_BEHIND, changed_options
from dpo_cache.stages.training.recipe import FIXED_IN_A_RUN
from dpo_cache.stages.training.run_config import settings_to_record
from dpo_cache.stages.training.train_config import TrainConfig

CACHE = Path("cache")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    settings = settings_to_record(TrainConfig(cache=CACHE, output=Path("run")))
    fingerprint = {"global_batch_size": 8}
    write_run_json(tmp_path / "config.json", {"settings": settings, "resume_fingerprint": fingerprint})
    return tmp_path


def test_a_number_is_traced_to_the_options_that_were_changed(recorded: Path) -> None:
    longer = TrainConfig(cache=CACHE, output=Path("moved"), num_train_epochs=2.0, beta=3.0, use_lora=True)
    for field in ("total_steps", "warmup_steps"):
        assert changed_options(recorded, longer, field) == ["--num-train-epochs was 1 and is 2"]
    assert changed_options(recorded, longer, "loss") == ["--beta was left out and is 3"]
    assert changed_options(recorded, longer, "lora") == ["--use-lora was left out and is given"]
    assert changed_options(recorded, longer, "seed") == []
    unclipped = TrainConfig(cache=CACHE, output=Path("run"), max_grad_norm=0.0)
    assert changed_options(recorded, unclipped, "max_grad_norm") == ["--max-grad-norm was 1 and is 0"]


def test_without_a_changed_option_the_contents_have_changed(recorded: Path) -> None:
    same = TrainConfig(cache=CACHE, output=Path("run"))
    assert changed_options(recorded, same, "mixture") == ["the mixture has other pairs by now"]
    assert changed_options(recorded / "none", same, "learning_rate") == []


def test_another_number_of_gpus_changes_the_pairs_per_update_without_an_option(recorded: Path) -> None:
    """Two GPUs with four pairs each: to be told to give the old values, which are given, would help nobody."""
    same = TrainConfig(cache=CACHE, output=Path("run"))
    (told,) = changed_options(recorded, same, "global_batch_size")
    assert told.endswith("the number of GPUs has changed (--global-batch-size 8 keeps it)")
    other = TrainConfig(cache=CACHE, output=Path("run"), global_batch_size=4)
    assert changed_options(recorded, other, "global_batch_size") == ["--global-batch-size was left out and is 4"]
    assert changed_options(recorded / "none", same, "global_batch_size") == []


def test_every_number_that_is_fixed_in_a_run_has_an_option() -> None:
    names = set(TrainConfig.__dataclass_fields__)
    assert set(FIXED_IN_A_RUN) <= names | OPTIONS_BEHIND.keys()
    assert {option for options in OPTIONS_BEHIND.values() for option in options} <= names

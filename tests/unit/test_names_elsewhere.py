"""Options of TRL and open-instruct are refused with what to do instead."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from documentation_blocks import ROOT
from dpo_cache import cli
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.objective import LOSS_TRAITS, NAMES_ELSEWHERE
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.names_elsewhere import INSTEAD, instead_of
from dpo_cache.stages.setting import settings_of, values_from_file
from dpo_cache.stages.training.train_config import TrainConfig

OURS = {one.name for config in (BuildConfig, TrainConfig) for one in settings_of(config)}
NOT_OPTIONS = {
    *("sft", "steps", "tensorboard", "callbacks", "compute_metrics", "accelerate launch --num_processes 8 …"),
}
"""What docs/migration.md translates and nobody types as an option."""


def names_in_the_guide() -> set[str]:
    guide = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| ")]
    cells += re.findall(r"^- (`[^:]+):", guide, flags=re.MULTILINE)
    code = [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]
    names = {re.split(r"[= ]", word.lstrip("-"))[0] if " --" not in word else word for word in code}
    return {name.strip('"').lower() for name in names}


def test_every_option_that_the_guide_translates_is_ours_or_answered() -> None:
    known = OURS | INSTEAD.keys() | LOSS_TRAITS.keys() | NAMES_ELSEWHERE.keys() | NOT_OPTIONS
    assert len(names_in_the_guide()) > 80
    assert not names_in_the_guide() - known


def test_advice_names_options_that_exist() -> None:
    flags = {flag for text in INSTEAD.values() for flag in re.findall(r"--[a-z][a-z0-9-]+", text)}
    assert flags <= {"--" + name.replace("_", "-") for name in OURS}
    for text in INSTEAD.values():
        assert text[0].islower() or text.startswith("AdamW"), text
        assert not text.endswith("."), text


def refusal(command: click.Command, *arguments: str) -> str:
    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 2
    return done.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--loss-type", "sigmoid"], "No such option '--loss-type': use dpo-train --loss."),
        (["--loss_type=sigmoid"], "No such option '--loss_type': use dpo-train --loss."),
        (
            ["--save-steps", "5"],
            "use dpo-train --checkpointing-steps for what a run resumes from, --model-saving-steps for models.",
        ),
        (["--tensor-parallel-size", "2"], "tensor, context and sequence parallelism are not supported;"),
        (["--sync-ref-model"], "the reference does not change during training (no TR-DPO)"),
        (["--max-length", "512"], "use dpo-cache build --max-seq-length."),
        (["--lora-dropout", "0.1"], "there is no dropout"),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_ours_or_a_reason(arguments: list[str], told: str) -> None:
    assert told in refusal(cli.dpo_train, "--cache", "c", "--output", "o", *arguments)


def test_a_misspelt_option_is_still_answered_with_similar_ones() -> None:
    assert "--beta" in refusal(cli.dpo_train, "--cache", "c", "--output", "o", "--betta", "1")
    assert instead_of("--betta") is None


def test_a_key_of_a_file_is_answered_likewise(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match="unknown option loss_type") as refused:
        values_from_file(TrainConfig, {"loss_type": "sigmoid"})
    assert refused.value.next_step == "use dpo-train --loss"
    config = tmp_path / "train.yaml"
    config.write_text("context_parallel_size: 2\n")
    assert "are not supported" in refusal(cli.dpo_train, "--cache", "c", "--output", "o", "--config", str(config))

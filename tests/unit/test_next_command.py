"""What a build, an import or a pull tells to type next is what ``dpo-train`` takes, and trains on no held-out pairs."""

from __future__ import annotations

import shlex
from pathlib import Path

from dpo_cache.cli import dpo_train
from dpo_cache.stages.console.next_command import training_commands
from dpo_cache.stages.training.train_config import TrainConfig

CACHE = "the cache's folder"
"""A path that a shell would take apart."""


def suggested(*mixtures: str) -> list[tuple[str, str | None]]:
    """What each command that is suggested would train on, and evaluate on."""
    configs = []
    for line in training_commands(Path(CACHE), mixtures).splitlines():
        _, arguments = line.split("dpo-train ")
        given = dpo_train.make_context("dpo-train", shlex.split(arguments)).params
        given.pop("as_json")
        configs.append(TrainConfig(**given))
    assert {str(config.cache) for config in configs} == {CACHE}
    return [(config.mixture, config.eval_mixture) for config in configs]


def test_the_usual_mixture_is_trained_on_whatever_comes_with_it() -> None:
    assert suggested("train") == suggested("held-out", "train") == [("train", None)]


def test_a_mixture_of_another_name_may_be_trained_or_evaluated_on() -> None:
    assert suggested("held-out") == [("held-out", None), ("train", "held-out")]

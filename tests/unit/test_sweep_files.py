"""The sweeps under scripts/sweep/ are what their commands take."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dpo_cache.cli import dpo_train
from dpo_cache.pipeline.training.objective import beta_warnings, resolve_objective
from dpo_cache.stages.sweeping.sweep_grid import read_grid
from dpo_cache.stages.training.best_model import FIELDS
from dpo_cache.stages.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ROOT / "scripts" / "sweep"
PRINTS_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


@pytest.mark.parametrize(("name", "betas", "rates", "builds"), [("beta_and_rate", 4, 3, 2), ("demo", 2, 2, 0)])
def test_an_example_grid_resolves(name: str, betas: int, rates: int, builds: int) -> None:
    grid = read_grid(SWEEPS / f"{name}.yaml")
    configs = [point.config for point in grid.points]
    assert len(configs) == betas * rates
    assert (len({config.beta for config in configs}), len({config.learning_rate for config in configs})) == (
        betas,
        rates,
    )
    assert {config.eval_mixture for config in configs} == {"held-out"}
    assert len(grid.builds) == builds


def agents_command(command: list[str], values: dict[str, Any]) -> list[str]:
    """The command of a run as wandb's agent makes it of these values, by its own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    words = utils.create_sweep_command(list(command))
    return [filled for word in words for filled in (macros.get(word[2:-1], [word]) if word[:2] == "${" else [word])]


@pytest.mark.parametrize(
    "values",
    [
        {"learning-rate": 4.7e-07, "beta": 5, "use-lora": True},
        {"learning-rate": 1e-06, "beta": 20, "use-lora": False},
    ],
)
def test_a_wandb_agent_starts_a_run_that_dpo_train_takes(values: dict[str, Any], tmp_path: Path) -> None:
    sweep = yaml.safe_load((SWEEPS / "wandb.yaml").read_text(encoding="utf-8"))
    assert sweep["parameters"].keys() == values.keys()
    stub = tmp_path / "dpo-train"
    stub.write_text(PRINTS_ARGUMENTS)
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "a1b2"}
    done = subprocess.run(
        agents_command(sweep["command"], values), env=environment, capture_output=True, text=True, check=True
    )
    given = dpo_train.make_context("dpo-train", done.stdout.splitlines()).params
    given.pop("as_json")
    assert TrainConfig(**given) == TrainConfig(
        cache=Path("tulu3-cache"),
        output=Path("runs/wandb/a1b2"),
        eval_mixture="held-out",
        eval_steps=200,
        with_tracking=True,
        learning_rate=values["learning-rate"],
        beta=values["beta"],
        use_lora=values["use-lora"],
    )


def test_no_beta_of_the_wandb_sweep_is_one_that_dpo_train_warns_about() -> None:
    parameters = yaml.safe_load((SWEEPS / "wandb.yaml").read_text(encoding="utf-8"))["parameters"]
    for beta in parameters["beta"]["values"]:
        assert beta_warnings(resolve_objective("dpo_norm", beta=beta)) == []


def test_the_metric_that_a_wandb_sweep_maximises_is_one_that_is_logged() -> None:
    metric = yaml.safe_load((SWEEPS / "wandb.yaml").read_text(encoding="utf-8"))["metric"]
    assert metric == {"name": FIELDS["accuracy"], "goal": "maximize"}

"""The command line: words to a config, one stage call, the report as text or as JSON.

Nothing heavy is imported here: ``--help`` answers at once, torch arrives with the stage that needs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_options import config_options
from .errors import DpoCacheError
from .stages.build_config import BuildConfig
from .stages.train_config import TrainConfig

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
cache_argument = click.argument("cache", type=click.Path(path_type=Path), metavar="DIR")


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
def dpo_cache() -> None:
    """Score preference pairs once with the reference model; train DPO from the cache."""


@dpo_cache.command("build", context_settings=CONTEXT)
@config_options(BuildConfig)
@json_option
def build_command(as_json: bool, **values: Any) -> None:
    """Score preference pairs with the reference and keep the log-probabilities.

    Scores only what the cache does not hold yet; stop it whenever you like and run it again to go on.

    \b
    Example:
      dpo-cache build --model allenai/Llama-3.1-Tulu-3-8B-SFT \\
          --dataset allenai/llama-3.1-tulu-3-8b-preference-mixture --cache tulu3-cache
    """
    with faults_explained(), stdout_for_reports():
        config = BuildConfig(**values)
        from .stages.build import build

        report = build(config)
    if report is not None:
        _print_report(report.summary(), report.to_json() if as_json else None)


@dpo_cache.command("score", hidden=True)
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("store")
@click.argument("rank_of_node", type=int)
def score_command(plan: Path, store: str, rank_of_node: int) -> None:
    """One scoring process of a build, which starts it."""
    with faults_explained():
        from .stages.job_store import StoreAddress
        from .stages.score import score_units

        score_units(plan, StoreAddress.parse(store), rank_of_node)


@dpo_cache.command("info", context_settings=CONTEXT)
@cache_argument
@json_option
def info_command(cache: Path, as_json: bool) -> None:
    """Say what a cache holds: the reference, its mixtures, rows, tokens, bytes, and what was dropped.

    \b
    Example:
      dpo-cache info tulu3-cache
    """
    with faults_explained():
        from .stages.inspect import inspect_cache

        report = inspect_cache(cache)
        click.echo(json.dumps(report.to_json(), indent=2) if as_json else report.text())


@click.command(context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
@config_options(TrainConfig)
@json_option
def dpo_train(as_json: bool, **values: Any) -> None:
    """Train a policy with DPO from a cache; the reference model is never loaded.

    \b
    Example:
      dpo-train --cache tulu3-cache --output runs/beta-5 --beta 5 --global-batch-size 128
    """
    with faults_explained(to_go_on="--resume goes on from the last checkpoint"), stdout_for_reports():
        config = TrainConfig(**values)
        from .stages.train import train

        report = train(config)
    if report is not None:
        _print_report(report.summary(), report.to_json() if as_json else None)


@contextlib.contextmanager
def faults_explained(*, to_go_on: str = "the same command goes on from there") -> Iterator[None]:
    """A fault the user can mend ends in its message and exit code 1, without a traceback."""
    try:
        yield
    except DpoCacheError as fault:
        _tell(f"Error: {fault}")
        sys.exit(1)
    except KeyboardInterrupt:
        _tell(f"Stopped: what is finished stays; {to_go_on}.")
        sys.exit(1)


def stdout_for_reports() -> contextlib.redirect_stdout[Any]:
    """Send what libraries print to stderr while they work, some of it as early as their import."""
    return contextlib.redirect_stdout(sys.stderr)


def _tell(message: str) -> None:
    """Print a fault; a process with a launcher leaves it to the launcher, which prints each message once."""
    fault_file = os.environ.get("DPO_CACHE_FAULT_FILE")
    if fault_file is None:
        click.echo(message, err=True)
    else:
        Path(fault_file).write_text(message, encoding="utf-8")


def _print_report(summary: str, as_json: Mapping[str, Any] | None) -> None:
    click.echo(summary, err=True)
    if as_json is not None:
        click.echo(json.dumps(as_json, indent=2))

"""The command line: words to a config, one stage call, the report as text or as JSON.

Nothing heavy is imported here: ``--help`` answers at once, torch arrives with the stage that needs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_completion import SHELLS, complete_mixture, completion_script
from .cli_help import GroupedCommand
from .cli_location import FILE, FOLDER, LOCATION
from .cli_options import config_options
from .cli_output import command_run, print_report, print_summary
from .errors import DpoCacheError
from .stages.addresses.location import Location
from .stages.building.build_config import BuildConfig
from .stages.interchange.import_config import NOT_IMPORTED, ImportConfig
from .stages.sweeping.sweep_config import SweepConfig
from .stages.training.train_config import TrainConfig

SAME_COMMAND = "the same command continues from there"

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
cache_argument = click.argument("cache", type=FOLDER, metavar="DIR")
readable_cache_argument = click.argument("cache", type=LOCATION, metavar="DIR_OR_ADDRESS")


NOT_EXPLAINED = (
    *("cache", "mixture", "replace", "extend", "drop_nonfinite"),
    *("num_workers", "tokens_per_batch", "zero_stage", "dry_run"),
)
"""Settings of a build that do not affect which rows are reused."""


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
def dpo_cache() -> None:
    """Score preference pairs once with the reference model, then train from the cache with dpo-train."""


@dpo_cache.command(
    "build", cls=GroupedCommand, context_settings=CONTEXT, short_help="Score preference pairs with the reference model."
)
@config_options(BuildConfig)
@json_option
def build_command(as_json: bool, **values: Any) -> None:
    """Score preference pairs with the reference model and store the log-probabilities.

    Scores only pairs that the cache does not hold yet. Stop it at any time; the same command continues.

    \b
    Example:
      dpo-cache build --model allenai/Llama-3.1-Tulu-3-8B-SFT \\
          --dataset allenai/llama-3.1-tulu-3-8b-preference-mixture --cache tulu3-cache
    """
    with command_run(to_go_on=SAME_COMMAND):
        config = BuildConfig(**values)
        from .stages.build import build

        report = build(config)
    if report is not None:
        print_summary(report.summary(), report.to_json() if as_json else None)


@dpo_cache.command("score", hidden=True)
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("store")
@click.argument("rank_of_node", type=int)
def score_command(plan: Path, store: str, rank_of_node: int) -> None:
    """One scoring process of a build, which starts it."""
    with command_run():
        from .stages.processes.job_store import StoreAddress
        from .stages.scoring.score import score_units

        score_units(plan, StoreAddress.parse(store), rank_of_node)


@dpo_cache.command("info", context_settings=CONTEXT, short_help="Show what a cache holds.")
@readable_cache_argument
@json_option
def info_command(cache: Location, as_json: bool) -> None:
    """Show what a cache holds: its reference, mixtures, rows, tokens and bytes, and which rows were skipped.

    \b
    Example:
      dpo-cache info tulu3-cache
    """
    with command_run():
        from .stages.info import cache_info

        report = cache_info(cache)
    print_report(report, as_json)


@dpo_cache.command("show", context_settings=CONTEXT, short_help="Print pairs as text, with the scored tokens coloured.")
@readable_cache_argument
@click.option("-n", "count", type=click.IntRange(min=1), help="Show this many pairs instead of 3.")
@click.option(
    "--mixture", help="Mixture to show.  [default: train, or the only one there is]", shell_complete=complete_mixture
)
@click.option("--key", metavar="HEX", help="Show the pair with this key, or with the only key that begins with it.")
@click.option(
    "--tokenizer", metavar="PATH_OR_ID", help="Where the tokenizer is now.  [default: where it was for the build]"
)
@json_option
def show_command(
    cache: Location, count: int | None, mixture: str | None, key: str | None, tokenizer: str | None, as_json: bool
) -> None:
    """Print pairs as text with the scored tokens coloured, their lengths and the reference's log-probabilities.

    \b
    Example:
      dpo-cache show tulu3-cache -n 2
    """
    with command_run():
        from .stages.show import show

        report = show(cache, count=count, mixture_name=mixture, key=key, tokenizer=tokenizer)
    print_report(report, as_json, coloured=True)


@dpo_cache.command("verify", context_settings=CONTEXT, short_help="Check every checksum, key, count and value.")
@readable_cache_argument
@click.option(
    "--rescore", type=click.IntRange(min=1), metavar="N", help="Also score N random pairs again with the reference."
)
@click.option("--model", metavar="PATH_OR_ID", help="For --rescore: the reference.  [default: as recorded]")
@click.option("--seed", type=int, help="For --rescore: seed of the sample.  [default: 0]")
@click.option("--trust-remote-code", is_flag=True, help="For --rescore: run Python code that comes with the model.")
@click.option("--repair", is_flag=True, help="Remove damaged files; the next build rescores only what they held.")
@json_option
def verify_command(
    cache: Location,
    rescore: int | None,
    model: str | None,
    seed: int | None,
    trust_remote_code: bool,
    repair: bool,
    as_json: bool,
) -> None:
    """Check every checksum, key, count and value. Exit code 1 if anything is wrong.

    \b
    Example:
      dpo-cache verify tulu3-cache --rescore 100
    """
    with command_run():
        from .stages.verify import verify_cache
        from .stages.verifying.rescore_settings import RescoreSettings

        rescoring = RescoreSettings.asked_for(rescore, model=model, seed=seed, trust_remote_code=trust_remote_code)
        report = verify_cache(cache, repair=repair, rescoring=rescoring)
    print_report(report, as_json)
    if not report.is_sound:
        sys.exit(1)


@dpo_cache.command(
    "explain", cls=GroupedCommand, context_settings=CONTEXT, short_help="Say which rows a build would reuse, and why."
)
@cache_argument
@config_options(BuildConfig, without=NOT_EXPLAINED, whole_file=True)
@json_option
def explain_command(cache: Path, as_json: bool, **values: Any) -> None:
    """Say which rows a build with these options would reuse and, for the others, which settings differ.

    --config takes the file of that build.

    \b
    Example:
      dpo-cache explain tulu3-cache --model allenai/Llama-3.1-Tulu-3-8B-SFT --dataset more.jsonl
    """
    with command_run():
        from .stages.explain import explain

        report = explain(BuildConfig(cache=cache, **values))
    print_report(report, as_json)


@dpo_cache.command("push", context_settings=CONTEXT, short_help="Upload a cache to the Hugging Face Hub.")
@cache_argument
@click.argument("repository", metavar="ORG/NAME")
@click.option("--revision", default="main", show_default=True, help="Branch; created if missing.")
@click.option(
    "--mixture",
    "mixtures",
    multiple=True,
    metavar="NAME",
    help="Push only this mixture. May be repeated.",
    shell_complete=complete_mixture,
)
@click.option("--public", is_flag=True, help="Make the dataset public.  [default: private]")
@json_option
def push_command(
    cache: Path, repository: str, revision: str, mixtures: tuple[str, ...], public: bool, as_json: bool
) -> None:
    """Upload a cache as a dataset on the Hugging Face Hub, with a card that says how to use it.

    Uploads only files that a mixture names and that are not there yet. Pointers are uploaded last, so nobody sees
    half a mixture.

    \b
    Example:
      dpo-cache push tulu3-cache my-lab/tulu3-cache
    """
    with command_run(to_go_on=SAME_COMMAND):
        from .stages.push import push

        report = push(cache, repository, revision=revision, public=public, mixture_names=mixtures)
    print_report(report, as_json)


@dpo_cache.command("pull", context_settings=CONTEXT, short_help="Download a shared cache and check it.")
@click.argument("source", metavar="ORG/NAME")
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
@click.option("--mixture", "mixtures", multiple=True, metavar="NAME", help="Pull only this mixture. May be repeated.")
@click.option("--replace", is_flag=True, help="Replace other mixtures of the same name in DIR.")
@json_option
def pull_command(
    source: str, folder: Path, revision: str | None, mixtures: tuple[str, ...], replace: bool, as_json: bool
) -> None:
    """Download a shared cache: a dataset on the Hugging Face Hub, or any address (s3://…, gs://…, https://…).

    Every digest is checked before the copy can be used. Stop it at any time; the same command continues.

    \b
    Example:
      dpo-cache pull my-lab/tulu3-cache tulu3-cache --mixture train
    """
    with command_run(to_go_on=SAME_COMMAND):
        from .stages.pull import pull

        report = pull(source, folder, revision=revision, mixture_names=mixtures, replace=replace)
    print_report(report, as_json)


@dpo_cache.command("merge", context_settings=CONTEXT, short_help="Merge caches of one reference.")
@click.argument("sources", nargs=-1, required=True, type=FOLDER, metavar="SRC …")
@click.option("--cache", type=FOLDER, required=True, help="The cache to merge into.")
@json_option
def merge_command(sources: tuple[Path, ...], cache: Path, as_json: bool) -> None:
    """Merge caches of one reference. Mixtures of the same name become one.

    For nodes without a shared file system that each built a part of the data into a folder of their own.

    \b
    Example:
      dpo-cache merge node0-cache node1-cache --cache tulu3-cache
    """
    with command_run(to_go_on=SAME_COMMAND):
        from .stages.merge import merge

        report = merge(sources, cache)
    print_report(report, as_json)


@dpo_cache.command("export", context_settings=CONTEXT, short_help="Write a mixture for TRL's DPOTrainer.")
@cache_argument
@click.argument("output", type=FOLDER, metavar="OUT")
@click.option(
    "--mixture", default="train", show_default=True, help="Mixture to write.", shell_complete=complete_mixture
)
@json_option
def export_command(cache: Path, output: Path, mixture: str, as_json: bool) -> None:
    """Write a mixture as a Parquet file with the columns that TRL's DPOTrainer reads.

    \b
    Example:
      dpo-cache export tulu3-cache tulu3.parquet
    """
    with command_run():
        from .stages.export import export

        report = export(cache, output, mixture_name=mixture)
    print_report(report, as_json)


@dpo_cache.command(
    "import", cls=GroupedCommand, context_settings=CONTEXT, short_help="Import values from TRL or open-instruct."
)
@click.argument("source", type=click.Path(path_type=Path), metavar="SOURCE")
@config_options(ImportConfig, without=NOT_IMPORTED)
@json_option
def import_command(source: Path, as_json: bool, **values: Any) -> None:
    """Import reference values that TRL or open-instruct computed. Only a sample is scored again.

    SOURCE is a .parquet or .arrow file or a saved dataset with TRL's columns, or a .pt file from open-instruct. Give
    the datasets and options of the run that wrote it.

    \b
    Example:
      dpo-cache import 3f1c8a.pt --values averages --model my-sft-model --dataset pairs.jsonl --cache my-cache
    """
    with command_run(to_go_on=SAME_COMMAND):
        config = ImportConfig(**values)
        from .stages.value_import import import_values

        report = import_values(source, config)
    print_report(report, as_json)


@dpo_cache.command("gc", context_settings=CONTEXT, short_help="Remove files that no mixture uses.")
@cache_argument
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option(
    "--min-age-days", type=click.FloatRange(min=0), default=7.0, show_default=True, help="Keep files younger than this."
)
@json_option
def gc_command(cache: Path, yes: bool, min_age_days: float, as_json: bool) -> None:
    """Remove shards and tables that no mixture names, and what killed builds left behind.

    \b
    Example:
      dpo-cache gc tulu3-cache
    """
    with command_run():
        from .stages.gc import GarbageReport, collect_garbage

        def agree(report: GarbageReport) -> bool:
            click.echo(report.text(), err=True)
            try:
                return yes or click.confirm("Remove them?", err=True)
            except (click.Abort, RuntimeError) as silence:  # no terminal, or none any more
                raise DpoCacheError("removal was not confirmed", next_step="add --yes") from silence

        report = collect_garbage(cache, min_age_days=min_age_days, agree=agree)
    print_report(report, as_json)


@dpo_cache.command("compact", context_settings=CONTEXT, short_help="Drop duplicate rows and join small shards.")
@cache_argument
@json_option
def compact_command(cache: Path, as_json: bool) -> None:
    """Drop duplicate rows and join small shards. Refused while a build, training, upload or verify uses the cache.

    \b
    Example:
      dpo-cache compact tulu3-cache
    """
    with command_run():
        from .stages.compact import compact

        report = compact(cache)
    print_report(report, as_json)


@dpo_cache.command("doctor", context_settings=CONTEXT, short_help="Check this machine and the installation.")
@json_option
def doctor_command(as_json: bool) -> None:
    """Check this machine: versions, GPUs, kernels, disks and logins, and what to do about each problem.

    Exit code 1 only if something keeps `dpo-cache build` or `dpo-train` from running.

    \b
    Example:
      dpo-cache doctor
    """
    with command_run():
        from .stages.doctor import examine

        report = examine(Path.cwd())
    print_report(report, as_json, coloured=True)
    if not report.can_run:
        sys.exit(1)


@dpo_cache.command("completion", context_settings=CONTEXT, short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print a script that makes your shell complete these commands, their options and values.

    \b
    Example, one line in ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish:
      eval "$(dpo-cache completion bash)"
      eval "$(dpo-cache completion zsh)"
      dpo-cache completion fish | source
    """
    click.echo(completion_script(shell))


@click.command(cls=GroupedCommand, context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
@config_options(TrainConfig)
@json_option
def dpo_train(as_json: bool, **values: Any) -> None:
    """Train a policy with DPO from a cache. The reference model is never loaded.

    \b
    Example:
      dpo-train --cache tulu3-cache --output runs/beta-5 --beta 5 --global-batch-size 128
    """
    with command_run(to_go_on="--resume continues from the last checkpoint"):
        config = TrainConfig(**values)
        from .stages.train import train

        report = train(config)
    if report is not None:
        print_summary(report.summary(), report.to_json() if as_json else None)


@click.command(cls=GroupedCommand, context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
@click.argument("grid", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="GRID.yaml")
@config_options(SweepConfig, from_file=False)
@json_option
def dpo_sweep(grid: Path, as_json: bool, **values: Any) -> None:
    """Train every point of a grid with dpo-train, all from one cache, and print a table of the results.

    The same command continues: finished points are skipped, interrupted ones resume. Exit code 1 if a point failed.

    \b
    Example:
      dpo-sweep scripts/sweep/beta_and_rate.yaml
    """
    with command_run(to_go_on=SAME_COMMAND):
        config = SweepConfig(**values)
        from .stages.sweep import sweep
        from .stages.sweeping.sweep_report import SweepReport

        report = sweep(grid, config)
    print_report(report, as_json)
    if isinstance(report, SweepReport) and report.num_failed:
        sys.exit(1)


@click.command(context_settings=CONTEXT)
@click.version_option(__version__, package_name="dpo-cache")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN …")
@click.option(
    *("-o", "--output", "page"),
    type=FILE,
    default=Path("report.html"),
    show_default=True,
    help="The HTML file to write; an existing one is replaced.",
)
@click.option(
    *("--png", "figures_folder"),
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also write each chart as a PNG into this folder. Needs matplotlib.",
)
@json_option
def dpo_report(runs: tuple[Path, ...], page: Path, figures_folder: Path | None, as_json: bool) -> None:
    """Put runs, or the runs of a sweep, on one HTML page that needs no network.

    A run may be finished, running or killed. The cache's contents are shown if the cache can still be read.

    \b
    Example:
      dpo-report runs/beta-2 runs/beta-5 -o report.html
    """
    with command_run():
        from .stages.report import report

        summary = report(runs, page, figures_folder=figures_folder)
    print_report(summary, as_json)

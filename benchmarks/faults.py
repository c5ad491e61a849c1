"""Break caches in every way we can think of, count what was lost, and keep the table.

    python benchmarks/faults.py

Prints and writes ``benchmarks/results/faults.md``. The tests do the same with fewer tries.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from result_table import RESULTS, keep_page, machine, markdown_table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from fault_trials import (  # noqa: E402
    Damage,
    Trials,
    all_flips,
    builders_at_once,
    can_mount,
    damages,
    fault_free_cache,
    full_disk_at_every_operation,
    full_disks,
    kills,
    lies,
    power_cuts,
    random_cuts,
    random_flips,
    read_only_folders,
    real_kills,
    recorded_build,
    stray_shards,
    through_states,
)
from power_loss import (  # noqa: E402
    Mutation,
    claimed_before_synced,
    renamed_before_synced,
    without_sync_of,
    without_sync_of_files,
)

TITLES = ("fault", "tries", "something lost", "damage unnoticed", "")
MUTANT_TITLES = ("safeguard removed", "states looked at, at most 100", "with something lost")
MUTANTS = """The same replay of power cuts was applied to code from which one safeguard had been removed. It must find
losses there; otherwise finding none above would mean nothing."""


@click.command()
@click.option("--kills", "num_kills", default=1000, show_default=True, help="SIGKILLs of stand-ins for a build.")
@click.option("--real-kills", "num_real_kills", default=5, show_default=True, help="SIGKILLs of dpo-cache build.")
@click.option("--flips", default=10_000, show_default=True, help="Random bits flipped.")
@click.option("--truncations", default=1000, show_default=True, help="Files cut short.")
@click.option("--lies", "num_lies", default=3000, show_default=True, help="Files changed under right digests.")
@click.option("--every-bit/--no-every-bit", default=True, show_default=True, help="Flip all bits of small files too.")
@click.option("--builders", multiple=True, type=int, default=(2, 8, 32), show_default=True, help="At once; repeatable.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS / "faults.md",
    help="Where the table is kept.",
)
def main(
    num_kills: int,
    num_real_kills: int,
    flips: int,
    truncations: int,
    num_lies: int,
    every_bit: bool,
    builders: tuple[int, ...],
    seed: int,
    output: Path,
) -> None:
    """Try every fault, print the table and keep it."""
    started = time.monotonic()
    all_trials: list[Trials] = []
    with tempfile.TemporaryDirectory() as scratch:

        def do(trial: Callable[[Path], Trials]) -> None:
            folder = Path(scratch) / str(len(all_trials))
            folder.mkdir()
            all_trials.append(trial(folder))
            click.echo(" | ".join(row_of(all_trials[-1])))
            for fault in all_trials[-1].faults[:5]:
                click.echo(f"    {fault}", err=True)

        do(power_cuts)
        if num_kills:
            do(lambda folder: kills(folder, num_kills, seed=seed))
        if num_real_kills:
            do(lambda folder: real_kills(folder, num_real_kills, seed=seed))
        for fault, changes in damages_to_do(flips, truncations, every_bit, seed):
            do(lambda folder, fault=fault, changes=changes: damaged(folder, fault, changes))  # type: ignore[misc]
        if num_lies:
            do(lambda folder: lies(folder, num_lies, seed=seed))
        do(lambda folder: full_disk_at_every_operation(folder, for_good=False))
        do(lambda folder: full_disk_at_every_operation(folder, for_good=True))
        if can_mount(HERE):
            do(lambda folder: full_disks(folder, range(8, 73, 4)))
            do(read_only_folders)
        else:
            click.echo("(this machine lets us mount nothing: no small and no read-only file systems)", err=True)
        for number in builders:
            do(lambda folder, number=number: builders_at_once(folder, number, overlapping=False))  # type: ignore[misc]
            do(lambda folder, number=number: builders_at_once(folder, number, overlapping=True))  # type: ignore[misc]
        do(stray_shards)
        mutants = list(mutant_rows(Path(scratch) / "mutants"))
    keep_page(
        output,
        "# Faults injected into a cache",
        markdown_table(TITLES, [row_of(trials) for trials in all_trials]),
        MUTANTS,
        markdown_table(MUTANT_TITLES, mutants),
        f"{machine('dpo-cache', 'pyarrow', 'numpy')}; {(time.monotonic() - started) / 60:.0f} minutes. Repeat with "
        "`python benchmarks/faults.py`.",
    )
    if any(trials.lost or trials.unnoticed for trials in all_trials):
        raise SystemExit(1)


def damages_to_do(
    flips: int, truncations: int, every_bit: bool, seed: int
) -> Iterator[tuple[str, Callable[[Path], Iterator[Damage]]]]:
    """What is done to the bytes of a cache."""
    if flips:
        yield "a bit flipped anywhere in the cache", lambda cache: random_flips(cache, flips, seed=seed)
    if every_bit:
        yield "every bit of a shard's footer flipped", lambda cache: all_flips(first(cache, "shards/*"), footer=True)
        yield "every bit of cache.json flipped", lambda cache: all_flips(cache / "cache.json")
        yield "every bit of a mixture's pointer flipped", lambda cache: all_flips(cache / "mixtures" / "train.json")
    if truncations:
        yield "a file cut short anywhere", lambda cache: random_cuts(cache, truncations, seed=seed)


def damaged(folder: Path, fault: str, changes: Callable[[Path], Iterator[Damage]]) -> Trials:
    """A cache of its own, damaged."""
    cache = fault_free_cache(folder / "cache")
    return damages(fault, cache, changes(cache), build_every=100)


def first(cache: Path, pattern: str) -> Path:
    """A file of the cache."""
    return min(cache.glob(pattern))


def mutant_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """The replay of what forgetful code would have done."""
    cache = folder / "cache"
    mutants: dict[str, Mutation] = {
        "nothing": list,
        "fsync of files": without_sync_of_files,
        "fsync of shards/": without_sync_of(cache / "shards"),
        "fsync of mixtures/": without_sync_of(cache / "mixtures"),
        "fsync of the cache folder": without_sync_of(cache),
        "fsync of the folder around it": without_sync_of(folder),
        "fsync before the rename (done after it)": renamed_before_synced,
        "fsync of the folder before success is told": claimed_before_synced,
    }
    operations = recorded_build(folder)
    for name, mutation in mutants.items():
        trials = through_states(folder, mutation(operations), limit=100)
        yield name, f"{trials.tries:,}", f"{trials.lost:,}"


def row_of(trials: Trials) -> tuple[str, ...]:
    """One line of the table."""
    return trials.fault, f"{trials.tries:,}", f"{trials.lost:,}", f"{trials.unnoticed:,}", trials.note


if __name__ == "__main__":
    main()

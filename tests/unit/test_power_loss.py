"""A power cut at any moment loses nothing a builder was told is durable, and shows nothing torn.

The sequence of calls is the real one of a build, recorded at the one seam through which every file of a cache is
written; the states are all that :mod:`power_loss` derives from it.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cache_factory import make_rows
from power_loss import (
    Mutation,
    Operation,
    Recorder,
    Stopped,
    as_if_slow,
    claimed_before_synced,
    crash_states,
    renamed_before_synced,
    through,
    without_sync_of,
    without_sync_of_files,
)
from stub_builder import StubBuild, faults_of, read_everything

ROWS = make_rows(8)


def record(root: Path, *, stop_before: int | None = None) -> list[Operation]:
    """The operations of a build in ``root``, which retires its mixture at last."""
    recorder = Recorder(stop_before=stop_before)
    with through(recorder):
        try:
            cache = StubBuild(cache=root / "cache", rows=ROWS).run(recorder.claim)
            cache.retire_mixture("train")
            recorder.claim(["mixture", "train", ""])
        except Stopped:
            pass
    return recorder.operations


def violations(
    root: Path, operations: Sequence[Operation], *, last: int = 0, build_again: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """What is wrong after each possible cut, with the number of states looked at so far."""
    for number, state in enumerate(crash_states(operations, last=last), start=1):
        with tempfile.TemporaryDirectory(dir=root) as folder, through(Recorder()):
            state.put(root, Path(folder))
            cache = Path(folder) / "cache"
            faults = faults_of(cache, state.claims, later=state.later)
            if build_again and not faults:
                StubBuild(cache=cache, rows=ROWS).run()
                if set(read_everything(cache)["train"].tolist()) != {row.key.rstrip(b"\0") for row in ROWS}:
                    faults = ["the next build is not complete"]
            yield number, faults


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def recorded(root: Path) -> list[Operation]:
    return record(root)


def test_no_state_a_power_cut_can_leave_loses_or_damages_anything(root: Path, recorded: list[Operation]) -> None:
    looked_at = 0
    for number, faults in violations(root, recorded):
        assert not faults, faults
        looked_at = number
    assert looked_at >= 40


MUTANTS: dict[str, Callable[[Path], Mutation]] = {
    "files are not synced": lambda root: without_sync_of_files,
    "shards/ is not synced": lambda root: without_sync_of(root / "cache" / "shards"),
    "mixtures/ is not synced": lambda root: without_sync_of(root / "cache" / "mixtures"),
    "the cache folder is not synced": lambda root: without_sync_of(root / "cache"),
    "the folder around the cache is not synced": without_sync_of,
    "files are renamed before they are synced": lambda root: renamed_before_synced,
    "success is told before the folder is synced": lambda root: claimed_before_synced,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_sync_left_out_is_caught(root: Path, recorded: list[Operation], mutant: str) -> None:
    mutated = MUTANTS[mutant](root)(recorded)
    assert mutated != recorded
    assert any(faults for _, faults in violations(root, mutated))


def test_shards_of_another_builder_that_has_not_synced_them_yet_are_safe_once_a_pointer_names_them(
    root: Path, recorded: list[Operation]
) -> None:
    slow = as_if_slow(recorded)
    assert len(slow) < len(recorded)
    assert not [faults for _, faults in violations(root, slow) if faults]


def test_a_build_after_one_that_died_before_syncing_makes_its_leftovers_durable_first(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    calls = [operation for operation in record(whole) if operation.kind != "claim"]
    deaths = [place for place, (first, second) in enumerate(itertools.pairwise(calls), start=1)
              if first.kind in ("rename", "make_folder") and second.kind == "sync_folder"]  # fmt: skip
    assert len(deaths) > 8
    for death in deaths:
        root = tmp_path / str(death)
        root.mkdir()
        died = record(root, stop_before=death)
        went_on = record(root)
        offset = len(died)
        renumbered = [op if op.kind not in ("create", "write", "sync") else _renumbered(op, offset) for op in went_on]
        for _, faults in violations(root, [*died, *renumbered], last=offset, build_again=False):
            assert not faults, (death, faults)


def _renumbered(operation: Operation, offset: int) -> Operation:
    return Operation(kind=operation.kind, path=operation.path, file=operation.file + offset, data=operation.data)

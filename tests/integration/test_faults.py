"""Real processes and files, broken: nothing told to be durable is lost, no damage is ever handed out.

After each fault the next build completes. ``benchmarks/faults.py`` does the same many more times.
"""

from __future__ import annotations

from pathlib import Path

import fault_trials
import pytest
from commands import dpo_cache, run
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import mixture_check
from fault_trials import Trials, fault_free_cache, random_cuts, random_flips
from stub_builder import read_everything


def assert_nothing_lost(trials: Trials) -> None:
    assert (trials.lost, trials.unnoticed) == (0, 0), trials.faults


def test_fifty_kills_lose_nothing_finished(tmp_path: Path) -> None:
    trials = fault_trials.kills(tmp_path, 50)
    assert trials.tries == 50
    assert_nothing_lost(trials)


@pytest.mark.parametrize("hashed", ["at once", "when read"])
def test_flipped_bits_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: str) -> None:
    """The shards of a big cache are hashed before their first row is used and not at once."""
    if hashed == "when read":
        monkeypatch.setattr(mixture_check, "HASH_AT_ONCE_BYTES", -1)
    cache = fault_free_cache(tmp_path / "cache")
    assert_nothing_lost(fault_trials.damages("flips", cache, random_flips(cache, 100), build_every=20))
    assert_nothing_lost(fault_trials.damages("cuts", cache, random_cuts(cache, 20), build_every=5))


@pytest.mark.parametrize("overlapping", [False, True])
def test_eight_builders_at_once_lose_no_row_and_have_none_twice(tmp_path: Path, overlapping: bool) -> None:
    assert_nothing_lost(fault_trials.builders_at_once(tmp_path, 8, overlapping=overlapping))


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_is_full_at_any_operation_ends_a_build_cleanly(tmp_path: Path, for_good: bool) -> None:
    trials = fault_trials.full_disk_at_every_operation(tmp_path, for_good=for_good)
    assert trials.tries > 40
    assert_nothing_lost(trials)


def test_small_and_read_only_file_systems_end_a_build_cleanly(tmp_path: Path) -> None:
    if not fault_trials.can_mount(tmp_path):
        pytest.skip("mounting needs user namespaces, which this machine does not allow")
    trials = fault_trials.full_disks(tmp_path, [8, 32, 52])
    assert trials.note.startswith("3 builds stopped")
    assert_nothing_lost(trials)
    assert_nothing_lost(fault_trials.read_only_folders(tmp_path))


def test_a_stray_shard_of_another_reference_is_named_and_never_read(tmp_path: Path) -> None:
    assert_nothing_lost(fault_trials.stray_shards(tmp_path))


def test_a_stranger_who_lies_under_right_digests_gets_a_clear_refusal(tmp_path: Path) -> None:
    assert_nothing_lost(fault_trials.lies(tmp_path, 150))


def test_real_builds_mend_a_cut_cache_json_and_a_mixture_whose_shard_is_gone(
    cache: Path, reference: Path, pairs_file: Path
) -> None:
    """The pairs come to lie in other shards than the one that the old pointer names."""
    (cache / "cache.json").write_bytes((cache / "cache.json").read_bytes()[:-1])
    [shard] = (cache / "shards").iterdir()
    shard.unlink()
    half = ("--dataset", f"{pairs_file},amount=20", "--mixture", "half")
    assert run(dpo_cache("build", "--model", reference, *half, "--cache", cache))["pairs_scored"] == 20
    with pytest.raises(DpoCacheError, match="lacks 40 pairs"):
        read_everything(cache)
    whole = run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache))
    assert (whole["pairs_reused"], whole["pairs_scored"]) == (20, 20)
    assert {name: len(keys) for name, keys in read_everything(cache).items()} == {"half": 20, "train": 40}

"""A build killed at any moment loses nothing it had finished, and the next one goes on from there."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
from commands import assert_same_logps, dpo_cache, kill_when, logps_by_key, run
from tiny_model import message_pairs, write_rows

NUM_PAIRS = 2400  # about ten units of work


def shards(cache: Path) -> int:
    return len(list((cache / "shards").glob("*.parquet"))) if cache.exists() else 0


def processes_using(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]


def test_a_build_killed_at_five_moments_ends_with_the_rows_of_one_never_killed(reference: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", message_pairs(NUM_PAIRS))
    options = ("build", "--model", reference, "--dataset", dataset, "--num-workers", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(dpo_cache(*options, "--cache", whole))["pairs_scored"] == NUM_PAIRS

    command = dpo_cache(*options, "--cache", killed)
    deaths = 0
    for moment in range(7):  # it may end before one of them
        if deaths == 5:
            break
        # By turns: while it starts and tokenises, as soon as one more shard is there, and a little after that.
        wanted = shards(killed) + (0, 1, 1)[moment % 3]
        delay_s = (2.0 + moment / 2, 0.0, 0.05)[moment % 3]

        def it_is_time(wanted: int = wanted, delay_s: float = delay_s) -> bool:
            if shards(killed) < wanted:
                return False
            time.sleep(delay_s)
            return True

        deaths += kill_when(command, it_is_time)
        survivors = psutil.wait_procs(processes_using(killed), timeout=5)[1]
        assert not survivors, "a scoring process outlived its parent"
        if shards(killed):
            logps_by_key(killed)  # every shard is whole, and no pair was scored twice
    assert deaths == 5

    kept = len(logps_by_key(killed)) if shards(killed) else 0
    report = run(command)
    assert (report["pairs_reused"], report["pairs_scored"]) == (kept, NUM_PAIRS - kept)
    assert_same_logps(logps_by_key(killed), logps_by_key(whole), relative=1e-6)
    assert run(command)["reference_forwards"] == 0


def test_a_build_asked_to_stop_says_how_to_go_on(reference: Path, tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", message_pairs(NUM_PAIRS))
    cache = tmp_path / "cache"
    command = dpo_cache("build", "--model", reference, "--dataset", dataset, "--cache", cache)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not shards(cache) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert said.rstrip().endswith("Stopped. Finished work is kept; the same command continues from there.")
    assert not list((cache / "tmp").glob("build-*"))
    kept = len(logps_by_key(cache))
    assert run(command)["pairs_reused"] == kept

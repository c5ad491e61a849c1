"""The commands that look after a cache, on real caches with real damage, in process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo_cache as dpo_cache_package
import numpy as np
import pytest
import torch
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows, read_shard
from commands import assert_same_logps, dpo_cache, dpo_train, logps_by_key, run
from commands_in_process import invoke, refusal, report
from dpo_cache.cli import dpo_cache as command
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import durable_file, shard_writer
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.canonical_json import read_sealed_json, write_sealed_json
from dpo_cache.pipeline.cache.example_key import prompt_hash_prefix
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.cache.shard_file import verify_shard
from dpo_cache.stages.compact import compact
from recorded_operations import RecordedOperations
from tiny_model import message_pairs, rendered_pair, tiny_tokenizer, write_rows, write_tiny_model

from .conftest import NUM_PAIRS

ROWS_A_SHARD = 10


def rows_of(cache: Path) -> list[ScoredPair]:
    return [row for path in ReferenceCache.open(cache).shards.paths() for row in read_shard(path)]


def rewrite(cache: Path, rows: Sequence[ScoredPair], *, rows_a_shard: int = ROWS_A_SHARD) -> None:
    """Let the cache consist of these rows, its mixture of the same pairs as before."""
    opened = ReferenceCache.open(cache)
    mixture = opened.read_mixture("train")
    mixture_rows_before = mixture.rows()
    for path in opened.shards.paths():
        path.unlink()
    for start in range(0, len(rows), rows_a_shard):
        opened.shards.write(rows[start : start + rows_a_shard])
    mixture.table.path.unlink()  # first: where the new shards' names happen to sort alike, the new table is the same
    write_train(opened, mixture_rows_before, like=mixture)


def write_train(cache: ReferenceCache, rows: Any, *, like: Any, **changes: Any) -> None:
    described = {"tokenization": like.tokenization, "sources": like.sources, "dropped": like.dropped} | changes
    cache.write_mixture("train", rows, key_index=cache.shards.key_index(), **described)


@pytest.fixture
def cache(shared_cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache in four shards, which the test may spoil."""
    copied = tmp_path / "cache"
    shutil.copytree(shared_cache, copied)
    rewrite(copied, rows_of(copied))
    return copied


def first_shard(cache: Path) -> Path:
    return sorted((cache / "shards").iterdir())[0]


def pointer(cache: Path) -> Path:
    return cache / "mixtures/train.json"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


# ---- verify ----------------------------------------------------------------------------------------------------------


def flip_in_shard(cache: Path) -> None:
    flip_a_bit(first_shard(cache))


def truncate_shard(cache: Path) -> None:
    os.truncate(first_shard(cache), 1000)


def remove_shard(cache: Path) -> None:
    first_shard(cache).unlink()


def flip_in_pointer(cache: Path) -> None:
    flip_a_bit(pointer(cache))


def flip_in_table(cache: Path) -> None:
    flip_a_bit(next((cache / "mixtures").glob("*.parquet")))


def change_counts(cache: Path) -> None:
    described = read_sealed_json(pointer(cache), max_bytes=1 << 20)
    described["num_ids"]["chosen"] += 1
    write_sealed_json(pointer(cache), described, temporary_folder=cache / "tmp")


def change_lengths(cache: Path) -> None:
    opened = ReferenceCache.open(cache)
    mixture = opened.read_mixture("train")
    rows = mixture.rows()
    one_more = np.arange(len(rows), dtype=np.int32) == 7
    write_train(opened, replace(rows, prompt_lengths=rows.prompt_lengths + one_more), like=mixture)


def forge_value(cache: Path) -> None:
    rows = rows_of(cache)
    rows[3] = replace(rows[3], ref_chosen_logps=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "refuse_unusable_values", lambda rows: None)
        rewrite(cache, rows)


def forge_ids(cache: Path) -> None:
    rows = rows_of(cache)
    rows[3] = replace(rows[3], pair=replace(rows[3].pair, prompt_ids=rows[3].pair.prompt_ids + np.int32(1)))
    rewrite(cache, rows)


DAMAGES = [
    (flip_in_shard, {"damaged-shard", "broken-mixture"}),
    (truncate_shard, {"damaged-shard", "broken-mixture"}),
    (remove_shard, {"missing-shard", "broken-mixture"}),
    (forge_value, {"unusable-shard", "broken-mixture"}),
    (forge_ids, {"wrong-keys"}),
    (flip_in_pointer, {"damaged-pointer"}),
    (flip_in_table, {"damaged-table", "broken-mixture"}),
    (change_counts, {"broken-mixture"}),
    (change_lengths, {"broken-mixture"}),
]


def test_a_whole_cache_is_sound(cache: Path) -> None:
    def content() -> dict[Path, int]:  # a verification holds a lock in tmp/
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.relative_to(cache).parts[0] != "tmp"}

    before = content()
    result = invoke("verify", cache)
    assert result.exit_code == 0
    assert "4 shards with 40 distinct pairs" in result.stdout
    assert "nothing is wrong" in result.stdout
    assert content() == before
    assert {path.suffix for path in (cache / "tmp").iterdir()} == {".lock"}


@pytest.mark.parametrize(("damage", "kinds"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_named_and_repair_leaves_a_sound_cache(
    cache: Path, damage: Callable[[Path], None], kinds: set[str]
) -> None:
    damage(cache)
    found = report("verify", cache, exit_code=1)
    assert {finding["kind"] for finding in found["findings"]} == kinds
    assert found["mixtures"] == {}
    text = invoke("verify", cache).stdout
    assert all(kind in text for kind in kinds)
    assert all(len(line) <= 80 for line in text.splitlines() if ".parquet" not in line and str(cache) not in line)
    assert f"next: dpo-cache verify {cache} --repair" in text
    assert report("verify", cache, "--repair")["retired"] == ["train"]
    assert report("verify", cache)["findings"] == []
    assert not pointer(cache).exists()


def test_what_does_not_belong_there_is_named_and_goes_without_the_mixture(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other")
    stray = other.shards.write(make_rows(5))
    shutil.copy(other.path / "shards" / stray.file_name, cache / "shards")
    (cache / "shards/notes.txt").write_text("mine")
    (cache / "mixtures/old.json.bak").write_text("{}")
    found = report("verify", cache, exit_code=1)
    assert [(finding["kind"], finding["path"]) for finding in found["findings"]] == [
        ("foreign-shard", f"shards/{stray.file_name}"),
        ("stray-file", "shards/notes.txt"),
        ("stray-file", "mixtures/old.json.bak"),
    ]
    assert found["mixtures"] == {"train": NUM_PAIRS}
    repaired = report("verify", cache, "--repair")
    assert (repaired["retired"], len(repaired["removed"])) == ([], 3)
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}


def test_a_pipe_in_the_place_of_a_shard_hangs_nobody(cache: Path) -> None:
    pipe = cache / "shards" / ("1" * 64 + ".parquet")
    os.mkfifo(pipe)
    (finding,) = report("verify", cache, exit_code=1)["findings"]
    assert (finding["kind"], "not a regular file" in finding["detail"]) == ("damaged-shard", True)
    invoke("verify", cache, "--repair")
    assert not pipe.exists()


def test_a_copy_without_the_empty_folder_can_be_looked_after(cache: Path) -> None:
    shutil.rmtree(cache / "tmp")
    assert invoke("verify", cache, "--repair").exit_code == 0
    shutil.rmtree(cache / "tmp")
    assert invoke("gc", cache, "--yes").exit_code == 0
    assert "there is no cache in" in refusal("verify", cache / "nowhere", "--repair")
    assert not (cache / "nowhere").exists()


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = first_shard(cache)
    monkeypatch.setattr(os, "access", lambda path, _mode: path != shard)  # root may read everything
    assert f"you may not read {shard}" in refusal("verify", cache, "--repair")
    assert shard.exists()


def test_a_file_that_cannot_be_read_just_now_is_not_taken_for_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks, networks and memory fail for a moment; every kind of file, opened or half read."""
    table = next((cache / "mixtures").glob("*.parquet"))
    before = {path: path.read_bytes() for path in cache.rglob("*.*") if path.parent.name != "tmp"}
    open_file, digest_file = os.open, hashlib.file_digest

    def fails_to_open(path: Any, *arguments: Any, **more: Any) -> int:
        if Path(path) == victim:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_file(path, *arguments, **more)

    def runs_out_of_memory(stream: Any, name: str) -> Any:
        if os.fstat(stream.fileno()).st_ino == victim.stat().st_ino:
            raise MemoryError
        return digest_file(stream, name)

    for victim in (first_shard(cache), table, pointer(cache), cache / "cache.json"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fails_to_open)
            message = refusal("verify", cache, "--repair")
        assert f"{victim} could not be read: Input/output error" in message
        assert "nothing says that it is damaged" in message
    for victim in (first_shard(cache), table):
        with monkeypatch.context() as patch:
            patch.setattr(hashlib, "file_digest", runs_out_of_memory)
            assert f"{victim} could not be read: there is not enough memory" in refusal("verify", cache, "--repair")
    assert {path: path.read_bytes() for path in before} == before


def newer_pointer(cache: Path) -> None:
    described = read_sealed_json(pointer(cache), max_bytes=1 << 20)
    write_sealed_json(pointer(cache), {**described, "format_version": 2}, temporary_folder=cache / "tmp")


def newer_shard(cache: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "FORMAT_VERSION", 2)
        ReferenceCache.open(cache).shards.write(make_rows(1))


@pytest.mark.parametrize("written_by_a_newer_version", [newer_pointer, newer_shard])
def test_what_a_newer_version_wrote_is_neither_damage_nor_garbage(
    cache: Path, reference: Path, pairs_file: Path, written_by_a_newer_version: Callable[[Path], None]
) -> None:
    written_by_a_newer_version(cache)
    before = {path: path.read_bytes() for path in cache.rglob("*.*") if path.parent.name != "tmp"}
    commands: list[list[str | Path | int]] = [["verify", cache], ["verify", cache, "--repair"]]
    commands += [["build", "--model", reference, "--dataset", pairs_file, "--cache", cache, "--replace"]]
    if written_by_a_newer_version is newer_pointer:
        commands += [["gc", cache, "--yes", "--min-age-days", 0]]
    for words in commands:
        assert "has format version 2\n  expected: version 1\n  next: use the dpo-cache that" in refusal(*words)
    assert {path: path.read_bytes() for path in cache.rglob("*.*") if path.parent.name != "tmp"} == before


def test_every_command_that_a_message_names_exists() -> None:
    package = Path(dpo_cache_package.__file__).parent
    sources = [path for folder in ("stages", "pipeline") for path in (package / folder).rglob("*.py")]
    named = {
        name
        for path in sources
        for name in re.findall(r"dpo-cache ([a-z]+) (?:\{|-|…)", path.read_text(encoding="utf-8"))
    }
    assert {"build", "verify"} <= named <= command.commands.keys()


def test_repair_retires_the_mixture_before_it_removes_a_shard_and_the_next_build_refills_that_shard(
    cache: Path, shared_cache: Path, reference: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_in_shard(cache)
    removals: list[Path] = []
    remove = durable_file.operations.remove

    def recorded(path: Path) -> None:
        removals.append(path)
        remove(path)

    monkeypatch.setattr(durable_file.operations, "remove", recorded)
    damaged = first_shard(cache)
    invoke("verify", cache, "--repair")
    assert removals == [pointer(cache), damaged]
    built = run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache))
    assert (built["pairs_scored"], built["pairs_reused"]) == (ROWS_A_SHARD, NUM_PAIRS - ROWS_A_SHARD)
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}
    assert_same_logps(logps_by_key(cache), logps_by_key(shared_cache), relative=1e-5)


def test_a_build_leads_the_mixture_round_a_damaged_shard_that_nobody_has_removed(
    cache: Path, reference: Path, pairs_file: Path
) -> None:
    flip_in_shard(cache)
    built = run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache))
    assert (built["pairs_scored"], built["pairs_reused"]) == (ROWS_A_SHARD, NUM_PAIRS - ROWS_A_SHARD)
    found = report("verify", cache, exit_code=1)
    assert [finding["kind"] for finding in found["findings"]] == ["damaged-shard"]
    assert found["mixtures"] == {"train": NUM_PAIRS}


def test_a_damaged_cache_json_is_written_again_by_the_next_build_and_costs_no_row(
    cache: Path, reference: Path, pairs_file: Path
) -> None:
    before = (cache / "cache.json").read_bytes()
    flip_a_bit(cache / "cache.json")
    assert [f["kind"] for f in report("verify", cache, exit_code=1)["findings"]] == ["damaged-cache-json"]
    assert report("verify", cache, "--repair")["removed"] == ["cache.json"]
    built = report("build", "--model", reference, "--dataset", pairs_file, "--cache", cache)
    assert (built["pairs_scored"], built["pairs_reused"]) == (0, NUM_PAIRS)
    assert json.loads((cache / "cache.json").read_bytes())["identity"] == json.loads(before)["identity"]


def test_repair_is_refused_while_a_build_runs(cache: Path) -> None:
    with ReferenceCache.open(cache).building("other"):
        assert "in use by a build of mixture other" in refusal("verify", cache, "--repair")
        assert invoke("verify", cache).exit_code == 0


# ---- rescoring -------------------------------------------------------------------------------------------------------


def test_the_reference_gives_its_values_again_in_other_batches(cache: Path) -> None:
    rescored = report("verify", cache, "--rescore", 15)["rescored"]
    assert (rescored["pairs"], rescored["dtype"], rescored["outliers"]) == (15, "float32", {})
    assert len({spread["way"] for spread in rescored["spreads"]}) == 2
    for spread in rescored["spreads"]:
        assert 0 <= spread["mean_per_token"] <= spread["max_per_token"] < 1e-5
        assert spread["max_in_bounds"] == pytest.approx(spread["max_per_token"] / 1e-4)


@pytest.mark.parametrize("value", ["ref_rejected_logps", "ref_rejected_common_logps"])
def test_a_forged_value_that_could_be_true_is_found_by_rescoring_alone(cache: Path, value: str) -> None:
    rows = rows_of(cache)
    forged = rows[7] = replace(rows[7], **{value: getattr(rows[7], value) - 0.5})
    rewrite(cache, rows)
    assert invoke("verify", cache).exit_code == 0
    found = report("verify", cache, "--rescore", NUM_PAIRS, exit_code=1)
    assert [finding["kind"] for finding in found["findings"]] == ["wrong-values"]
    assert forged.key.hex() in found["findings"][0]["detail"]
    assert report("verify", cache, "--rescore", NUM_PAIRS, "--repair")["retired"] == ["train"]
    assert len(rows_of(cache)) == NUM_PAIRS - ROWS_A_SHARD


def test_a_reference_that_moved_is_named_and_another_is_refused(cache: Path, reference: Path, tmp_path: Path) -> None:
    described = read_sealed_json(cache / "cache.json", max_bytes=1 << 20)
    described["recorded"]["model"] = str(tmp_path / "gone")
    write_sealed_json(cache / "cache.json", described, temporary_folder=cache / "tmp")
    assert "--model WHERE_IT_IS_NOW" in refusal("verify", cache, "--rescore", 5)
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert "(weights_sha256: cached" in refusal("verify", cache, "--rescore", 5, "--model", other)
    assert report("verify", cache, "--rescore", 5, "--model", reference)["rescored"]["pairs"] == 5
    described["recorded"]["adapter"] = str(tmp_path / "gone-too")
    write_sealed_json(cache / "cache.json", described, temporary_folder=cache / "tmp")
    message = refusal("verify", cache, "--rescore", 5, "--model", reference)
    assert "adapter is not where it was" in message
    assert "gone-too" in message
    assert "put it back" in message


def test_values_that_code_of_the_models_own_computed_are_scored_again_only_by_that_code(
    reference: Path, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "cache", remote_code_sha256="d" * 64)
    fill_cache(cache, make_rows(3), shard_rows=3)
    message = refusal("verify", cache.path, "--rescore", 1, "--model", reference)
    assert "computed by Python code that came with the model, and it does not run unasked" in message
    assert "--trust-remote-code" in message
    message = refusal("verify", cache.path, "--rescore", 1, "--model", reference, "--trust-remote-code")
    assert f"remote_code_sha256: cached '{'d' * 12}…', asked for None" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would score them again")
def test_values_that_a_kernel_of_gpus_computed_are_scored_again_only_by_a_gpu(reference: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", attention="flex_attention")
    fill_cache(cache, make_rows(3), shard_rows=3)
    message = refusal("verify", cache.path, "--rescore", 1, "--model", reference)
    assert "computed with flex_attention, which runs on a GPU, and this is a cpu" in message
    assert report("verify", cache.path)["sound"]


# ---- gc and compact --------------------------------------------------------------------------------------------------


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


@pytest.fixture
def littered(cache: Path) -> list[Path]:
    """A shard, a table and leftovers that no mixture names."""
    opened = ReferenceCache.open(cache)
    table = cache / "mixtures" / ("0" * 64 + ".parquet")
    table.write_bytes(b"what a mixture was")
    partial, scratch = cache / "tmp/ab.partial", cache / "tmp/build-ab"
    partial.write_bytes(b"half")
    scratch.mkdir()
    (scratch / "pairs.arrow").write_bytes(b"tokens")
    shard = opened.shards.write(make_rows(5))
    return [cache / "shards" / shard.file_name, table, partial, scratch]


def test_gc_removes_what_no_mixture_names_once_it_is_old_and_after_asking(cache: Path, littered: list[Path]) -> None:
    kept = invoke("gc", cache, "--yes")
    assert "nothing to remove" in kept.stdout
    assert "kept 4 files younger than 7 days" in kept.stdout
    for path in littered:
        age(path, 8)
    age(first_shard(cache), 8)
    asked = invoke("gc", cache, answer="n\n")
    assert "no mixture names 1 shards, 1 tables, 2 leftovers" in asked.output
    assert "Remove them?" in asked.output
    assert all(path.exists() for path in littered)
    assert invoke("gc", cache, answer="y\n").exit_code == 0
    assert not any(path.exists() for path in littered)
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}


def test_gc_takes_another_age_and_refuses_while_a_build_runs_or_a_pointer_is_damaged(
    cache: Path, littered: list[Path]
) -> None:
    with ReferenceCache.open(cache).building("other"):
        assert "in use by a build of mixture other" in refusal("gc", cache, "--yes", "--min-age-days", 0)
    assert all(path.exists() for path in littered)
    content = pointer(cache).read_bytes()
    flip_a_bit(pointer(cache))
    assert "nobody can say what is in use" in refusal("gc", cache, "--yes", "--min-age-days", 0)
    pointer(cache).write_bytes(content)
    assert len(report("gc", cache, "--yes", "--min-age-days", 0)["garbage"]) == 4
    assert not any(path.exists() for path in littered)


def test_compact_drops_the_rows_that_stand_twice_and_keeps_the_training_set(cache: Path) -> None:
    opened = ReferenceCache.open(cache)
    digest = opened.read_mixture("train").digest
    rows = rows_of(cache)
    opened.shards.write(rows[5:25])
    assert report("verify", cache)["duplicates"] == 20
    assert report("compact", cache)["dropped_rows"] == 20
    found = report("verify", cache)
    assert (found["pairs"], found["duplicates"], found["mixtures"]) == (NUM_PAIRS, 0, {"train": NUM_PAIRS})
    assert opened.read_mixture("train").digest == digest
    assert len(logps_by_key(cache)) == NUM_PAIRS
    assert "nothing to do" in invoke("compact", cache).stdout


def test_compact_joins_the_shards_of_many_small_builds_and_changes_no_row(cache: Path) -> None:
    """Rows that were imported stay apart from those that were scored: their shards say so."""
    opened = ReferenceCache.open(cache)
    rows = sorted(rows_of(cache), key=lambda row: row.key)
    mixture = opened.read_mixture("train")
    for path in opened.shards.paths():
        path.unlink()
    for number, row in enumerate(rows):
        opened.shards.write([row], recorded={"imported": {"from": "trl"}} if number % 4 == 0 else {"device": "cpu"})
    write_train(opened, mixture.rows(), like=mixture)
    before = [row.key for row in opened.pairs("train")]
    values = logps_by_key(cache)
    assert report("compact", cache) == {
        "cache": str(cache),
        "dropped_rows": 0,
        "shards_before": NUM_PAIRS,
        "shards_after": 2,
        "rewritten_mixtures": ["train"],
    }
    compacted = opened.read_mixture("train")
    assert (compacted.digest, compacted.sources) == (mixture.digest, mixture.sources)
    assert [row.key for row in opened.pairs("train")] == before
    assert logps_by_key(cache) == values
    sizes = {}
    for path in opened.shards.paths():
        with opened.shards.open(path) as shard:
            sizes["imported" in shard.recorded] = shard.num_rows
            prompts = [prompt_hash_prefix(row.pair.prompt_ids) for row in read_shard(path)]
            assert prompts == sorted(prompts)
    assert sizes == {True: NUM_PAIRS // 4, False: NUM_PAIRS - NUM_PAIRS // 4}
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}
    assert report("compact", cache)["rewritten_mixtures"] == []


def test_compacting_may_end_at_any_operation_without_a_mixture_that_names_what_is_gone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ReferenceCache.open(cache).shards.write(rows_of(cache)[5:25])
    calls = 0
    for fail_at in range(1000):
        interrupted = tmp_path / "interrupted"
        shutil.copytree(cache, interrupted)
        operations = RecordedOperations(fail_at)
        monkeypatch.setattr(durable_file, "operations", operations)
        ended = invoke("compact", interrupted).exit_code
        monkeypatch.setattr(durable_file, "operations", durable_file.FileOperations())
        if not ended:
            break
        calls += 1
        assert report("verify", interrupted)["mixtures"] == {"train": NUM_PAIRS}
        report("compact", interrupted)
        found = report("verify", interrupted)
        assert (found["shards"], found["pairs"], found["duplicates"]) == (1, NUM_PAIRS, 0)
        shutil.rmtree(interrupted)
    assert calls > 20


def test_a_shard_all_of_whose_rows_stand_elsewhere_goes_and_the_other_stays(cache: Path) -> None:
    """What is written anew may be the very bytes of a shard that is there: it must not be removed as outdated."""
    assert report("compact", cache)["shards_after"] == 1
    opened = ReferenceCache.open(cache)
    (whole,) = opened.shards.paths()
    with opened.shards.open(whole) as shard:
        recorded = shard.recorded
    opened.shards.write(read_shard(whole)[::-1], recorded=recorded)
    assert report("compact", cache)["dropped_rows"] == NUM_PAIRS
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}
    assert len(opened.shards.paths()) == 1


def test_nothing_is_deleted_under_a_training(cache: Path, littered: list[Path], tmp_path: Path) -> None:
    command = dpo_train("--cache", cache, "--output", tmp_path / "run", "--max-steps", 10_000)
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert training.poll() is None
            time.sleep(0.05)
        for refused in (("compact", cache), ("gc", cache, "--yes", "--min-age-days", 0), ("verify", cache, "--repair")):
            assert "is in use by a training (process " in refusal(*refused)
        assert invoke("verify", cache).exit_code == 1  # the litter; looking is free
    finally:
        os.killpg(training.pid, signal.SIGKILL)
        training.wait()
    assert len(report("gc", cache, "--yes", "--min-age-days", 0)["garbage"]) == len(littered)


def test_nothing_is_deleted_under_a_verification_which_would_take_it_for_lost(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def hashed(path: Path) -> None:
        with pytest.raises(DpoCacheError) as caught:
            compact(cache)
        refused.append(caught.value.found)
        verify_shard(path)

    monkeypatch.setattr("dpo_cache.stages.verify.verify_shard", hashed)
    assert report("verify", cache)["mixtures"] == {"train": NUM_PAIRS}
    assert "is in use by a verification (process " in refused[0]
    with ReferenceCache.open(cache).maintaining("compacting"):
        assert "a verification cannot start" in refusal("verify", cache)


@pytest.mark.parametrize("options", [[], ["--repair"]])
def test_verifying_writes_nothing_through_a_link_in_the_place_of_tmp(
    cache: Path, tmp_path: Path, options: list[str]
) -> None:
    shutil.rmtree(cache / "tmp")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (cache / "tmp").symlink_to(elsewhere)
    assert "is a symbolic link" in refusal("verify", cache, *options)
    assert not list(elsewhere.iterdir())


# ---- merge -----------------------------------------------------------------------------------------------------------


def part_of(whole: Path, path: Path, bounds: slice, *, name: str = "train", **changes: Any) -> Path:
    """A cache of some rows of another, as a node would have built it from its share of the data."""
    described = ReferenceCache.open(whole)
    mixture = described.read_mixture("train")
    part = ReferenceCache.create(path, described.description)
    rows = sorted(rows_of(whole), key=lambda row: row.key)[bounds]
    part.shards.write(rows)
    part.write_mixture(
        name,
        mixture_rows(rows),
        key_index=part.shards.key_index(),
        **{
            "tokenization": mixture.tokenization,
            "sources": [{"path": path.name, "dropped": {"empty-response": 1}}],
            "dropped": {"empty-response": 1},
            **changes,
        },
    )
    return path


def test_parts_that_nodes_built_merge_into_the_mixture_that_one_build_makes(
    cache: Path, shared_cache: Path, tmp_path: Path
) -> None:
    parts = [part_of(cache, tmp_path / f"node{start}", slice(start, start + 20)) for start in (0, 20)]
    extra = part_of(cache, tmp_path / "more", slice(0, 7), name="small")
    merged = tmp_path / "merged"
    done = report("merge", *parts, extra, "--cache", merged)
    assert (done["pairs"], done["mixtures"]) == (NUM_PAIRS, {"train": NUM_PAIRS, "small": 7})
    assert report("verify", merged)["mixtures"] == {"train": NUM_PAIRS, "small": 7}
    whole, united = (ReferenceCache.open(path).read_mixture("train") for path in (shared_cache, merged))
    assert united.digest == whole.digest
    assert [source["path"] for source in united.sources] == ["node0", "node20"]
    assert united.dropped == {"empty-response": 2}
    rows = united.rows()
    assert np.bincount(rows.sources).tolist() == [20, 20]


def test_the_order_in_which_caches_are_merged_does_not_matter_and_merging_again_touches_nothing(
    cache: Path, tmp_path: Path
) -> None:
    """The parts overlap: a pair that two datasets hold is trained on twice."""
    parts = [part_of(cache, tmp_path / f"node{start}", slice(start, start + 20)) for start in (0, 10, 20)]
    pointers = []
    for number, order in enumerate((parts, parts[::-1])):
        merged = tmp_path / f"merged{number}"
        assert report("merge", *order, "--cache", merged)["mixtures"] == {"train": 60}
        pointers.append(pointer(merged).read_bytes())
    assert pointers[0] == pointers[1]
    before = {path: path.stat() for path in merged.rglob("*.*") if path.parent.name != "tmp"}
    again = report("merge", parts[1], parts[0], "--cache", merged)
    assert (again["shards"], again["changed"], again["mixtures"]) == (0, [], {"train": 60})
    text = invoke("merge", parts[1], "--cache", merged).stdout
    assert "no shard is new" in text
    assert "mixture train: 60 training pairs, nothing new" in text
    for path, status in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def test_merging_puts_a_sound_shard_in_the_place_of_a_damaged_one_and_goes_round_another(
    cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    flip_in_shard(copy)
    (torn := copy / "shards" / f"{'0' * 64}.parquet").write_bytes(b"PAR1")
    assert report("merge", cache, "--cache", copy)["shards"] == 1
    found = report("verify", copy, exit_code=1)
    assert [finding["path"] for finding in found["findings"]] == [f"shards/{torn.name}"]


def test_merge_refuses_another_reference_other_tokens_and_damage_by_name(cache: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    other = make_cache(tmp_path / "other")
    message = refusal("merge", cache, other.path, "--cache", merged)
    assert f"{other.path} cannot be merged" in message
    assert "weights_sha256: cached" in message
    assert "config.rope_theta" in message
    assert not merged.exists()
    tokenization = ReferenceCache.open(cache).read_mixture("train").tokenization
    settings = {**tokenization["settings"], "max_seq_length": 77}
    shorter = part_of(cache, tmp_path / "shorter", slice(0, 9), tokenization={**tokenization, "settings": settings})
    message = refusal("merge", cache, shorter, "--cache", merged)
    assert "max_seq_length (was 2048, now 77)" in message
    assert not merged.exists()
    flip_in_shard(cache)
    assert "is damaged" in refusal("merge", cache, "--cache", merged)
    assert not ReferenceCache.open(merged).mixture_names()


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_names_the_rows_that_are_reused_and_those_that_are_new(
    cache: Path, reference: Path, tmp_path: Path
) -> None:
    rows = message_pairs(50)
    more = write_rows(tmp_path / "more.jsonl", [*rows[:5], *rows[45:], *rows[5:40]])
    explained = report("explain", cache, "--model", reference, "--dataset", more)
    assert (explained["pairs_reused"], explained["distinct_pairs"]) == (40, 45)
    assert explained["sources"][0]["rows_unknown"] == [[5, 9]]
    assert (explained["reference_differs_in"], explained["tokens_differ_in"]) == ([], {})
    text = invoke("explain", cache, "--model", reference, "--dataset", more).stdout
    assert "reused     40 of 45 distinct pairs" in text
    assert "5 rows have other tokens: rows 5–9" in text
    assert "made with the cache's settings" in text
    pointer(cache).unlink()  # as after a build that was killed: nothing says how its tokens were made
    text = invoke("explain", cache, "--model", reference, "--dataset", more).stdout
    assert "made with the cache's settings" not in text
    assert "no build has finished" in text


def test_explain_takes_the_file_of_a_build_as_it_is(
    cache: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    options = {
        "model": str(reference),
        "dataset": str(pairs_file),
        "cache": "elsewhere",
        "mixture": "a",
        "zero_stage": 3,
    }
    (tmp_path / "build.yaml").write_text(json.dumps({**options, "max_seq_length": 1024}), encoding="utf-8")
    explained = report("explain", cache, "--config", tmp_path / "build.yaml")
    assert (explained["cache"], explained["pairs_reused"]) == (str(cache), NUM_PAIRS)
    (tmp_path / "build.yaml").write_text(json.dumps({**options, "max_seq_lenght": 1024}), encoding="utf-8")
    assert "unknown option max_seq_lenght" in invoke("explain", cache, "--config", tmp_path / "build.yaml").stderr


def test_explain_names_every_field_of_another_reference_with_both_values(
    cache: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    arguments = ("explain", cache, "--model", other, "--dataset", pairs_file, "--dtype", "bfloat16")
    explained = report(*arguments)
    assert (explained["pairs_reused"], explained["pairs_with_known_tokens"]) == (0, NUM_PAIRS)
    differing = {field["field"]: (field["cached"], field["yours"]) for field in explained["reference_differs_in"]}
    assert differing == {
        "compute_dtype": ("float32", "bfloat16"),
        "weight_dtype": ("float32", "bfloat16"),
        "config.rms_norm_eps": (1e-6, 0.5),
    }
    text = invoke(*arguments).stdout
    assert all(word in text for word in ("config.rms_norm_eps", "1e-06", "0.5", "'bfloat16'"))


def test_explain_names_the_settings_that_make_other_tokens(
    cache: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
    explained = report(
        *("explain", cache, "--model", reference, "--dataset", pairs_file),
        *("--chat-template", template, "--max-seq-length", 512),
    )
    assert explained["pairs_reused"] == 0
    fields = {field["field"]: (field["cached"], field["yours"]) for field in explained["tokens_differ_in"]["train"]}
    assert fields.keys() == {"chat_template", "max_seq_length"}
    assert fields["max_seq_length"] == (2048, 512)


def test_explain_names_a_template_that_renders_otherwise_than_it_did(
    cache: Path, reference: Path, pairs_file: Path
) -> None:
    opened = ReferenceCache.open(cache)
    mixture = opened.read_mixture("train")
    yesterdays = {**mixture.tokenization, "rendered_example": "Today is 1 May", "libraries": {"transformers": "1.0"}}
    write_train(opened, mixture.rows(), like=mixture, tokenization=yesterdays)
    explained = report("explain", cache, "--model", reference, "--dataset", pairs_file)
    differing = {field["field"]: field["cached"] for field in explained["tokens_differ_in"]["train"]}
    assert differing["rendered_example"] == "Today is 1 May"
    assert differing["libraries.transformers"] == "1.0"


# ---- show ------------------------------------------------------------------------------------------------------------


def test_show_prints_the_text_and_what_the_reference_said(cache: Path, reference: Path, pairs_file: Path) -> None:
    row = min(rows_of(cache), key=lambda row: row.key)
    (line,) = (
        line
        for line in map(json.loads, pairs_file.read_text().splitlines())
        if rendered_pair(reference, line)[1] == row.pair.chosen_ids.tolist()
    )
    shown = report("show", cache, "--key", row.key.hex()[:12])["pairs"]
    assert [pair["key"] for pair in shown] == [row.key.hex()]
    assert shown[0]["prompt"] == f"<|user|>{line['chosen'][0]['content']}<|assistant|>"
    assert shown[0]["chosen"] == f"{line['chosen'][1]['content']}<|endoftext|>"
    assert shown[0]["scored"]["prompt"] == [[shown[0]["prompt"], False]]
    assert shown[0]["scored"]["rejected"] == [[shown[0]["rejected"], True]]
    plain = invoke("show", cache, "--key", row.key.hex()).stdout
    assert f"reference {row.ref_chosen_logps:.3f} nats, {row.ref_chosen_logps / row.chosen_tokens:.4f} a token" in plain
    assert shown[0]["rejected"] in plain
    assert "\x1b" not in plain


def test_show_colours_scored_tokens_on_a_terminal_and_follows_the_mixture(cache: Path) -> None:
    shown = report("show", cache, "-n", 2)["pairs"]
    keys = ReferenceCache.open(cache).read_mixture("train").rows().example_keys[:2]
    assert [pair["key"] for pair in shown] == [key.hex() for key in keys.tolist()]
    coloured = invoke("show", cache, "-n", 2, color=True).stdout
    assert f"\x1b[32m{shown[0]['chosen']}\x1b[0m" in coloured
    assert f"\x1b[31m{shown[1]['rejected']}\x1b[0m" in coloured
    assert f"\n{shown[0]['prompt']}\n" in coloured


def test_a_key_is_shown_whatever_the_mixtures_are_called(cache: Path) -> None:
    """As of the pairs that bad_batch.json names, whose run may have trained on any mixture."""
    opened = ReferenceCache.open(cache)
    mixture = opened.read_mixture("train")
    described: Any = {"tokenization": mixture.tokenization, "sources": mixture.sources, "dropped": mixture.dropped}
    for name in ("helpful", "held-out"):
        opened.write_mixture(name, mixture.rows(), key_index=opened.shards.key_index(), **described)
    opened.retire_mixture("train")
    key = rows_of(cache)[7].key.hex()
    (pair,) = report("show", cache, "--key", key)["pairs"]
    assert pair["key"] == key
    assert "one of: held-out, helpful" in refusal("show", cache)


def test_show_prints_ids_where_the_tokenizer_is_gone_and_refuses_keys_that_are_none(
    cache: Path, tmp_path: Path
) -> None:
    opened = ReferenceCache.open(cache)
    mixture = opened.read_mixture("train")
    settings = {**mixture.tokenization["settings"], "tokenizer": str(tmp_path / "gone")}
    write_train(opened, mixture.rows(), like=mixture, tokenization={**mixture.tokenization, "settings": settings})
    shown = report("show", cache, "-n", 1)
    assert shown["note"] == (
        f"the tokenizer that made these tokens could not be loaded (there is no folder {tmp_path / 'gone'}): here are "
        "their ids; --tokenizer names where it is now"
    )
    moved = mixture.tokenization["settings"]["tokenizer"]
    found = report("show", cache, "-n", 1, "--tokenizer", moved)
    assert found["note"] is None
    assert found["pairs"][0]["chosen_ids"] == shown["pairs"][0]["chosen_ids"]
    assert found["pairs"][0]["chosen"] != shown["pairs"][0]["chosen"]
    gone = refusal("show", cache, "--tokenizer", tmp_path / "gone")
    assert f"--tokenizer {tmp_path / 'gone'}: there is no folder {tmp_path / 'gone'}" in gone
    tiny_tokenizer(["words of another language"]).save_pretrained(tmp_path / "other")
    assert "has another vocabulary than" in refusal("show", cache, "--tokenizer", tmp_path / "other")
    assert shown["pairs"][0]["chosen"].split() == [str(token) for token in shown["pairs"][0]["chosen_ids"]]
    assert "no pairs of" in refusal("show", cache, "--key", "0" * 64)
    assert "is no key" in refusal("show", cache, "--key", "xyz")
    assert "-n has no effect with --key" in refusal("show", cache, "--key", "0", "-n", 2)


def test_show_marks_exactly_the_tokens_of_the_mask(tmp_path: Path) -> None:
    made_up = make_cache(tmp_path / "made-up")
    rows = make_rows(12)
    fill_cache(made_up, rows, shard_rows=5)
    by_key = {row.key.hex(): row.pair for row in rows}
    shown = report("show", made_up.path, "-n", 99)["pairs"]
    assert len(shown) == len(rows)
    for pair in shown:
        for side, scored in (("prompt", "prompt_scored"), ("chosen", "chosen_scored"), ("rejected", "rejected_scored")):
            marked = [is_scored for text, is_scored in pair["scored"][side] for _ in text.split()]
            assert marked == getattr(by_key[pair["key"]], scored).tolist()


def test_info_shows_whatever_a_strangers_cache_records(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(4), shard_rows=4)
    for name, member, value in (
        ("cache.json", "recorded", {"model": 5, "commit": 7, "begun_with": "elsewhere"}),
        ("mixtures/train.json", "tokenization", {"settings": None}),
    ):
        content = read_sealed_json(cache.path / name, max_bytes=10**6)
        write_sealed_json(cache.path / name, content | {member: value}, temporary_folder=cache.path / "tmp")
    result = invoke("info", cache.path)
    assert result.exit_code == 0
    assert "reference  5 @ 7" in result.stdout

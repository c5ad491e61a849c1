"""Faults done to a cache again and again, and what became of it: shared by tests and ``benchmarks/faults.py``.

After each fault a cache must be valid or the damage be found, nothing that a builder was told is durable may be
lost, and the next build must complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cache_factory import fill_cache, make_cache, make_rows
from commands import dpo_cache, logps_by_key, run
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.canonical_json import canonical_bytes
from power_loss import Operation, Recorder, crash_states, through
from stub_builder import Claim, StubBuild, StubProcesses, faults_of, read_everything, stub_build

ROWS = make_rows(12)
ROUND = 20
"""Kills of one cache, from its creation on."""


@dataclass(kw_only=True, slots=True)
class Trials:
    """A row of the table.

    Attributes:
        fault: What was done.
        tries: How often.
        lost: How often something told to be durable was gone, or the next build did not complete.
        unnoticed: How often damage came through every check.
        note: What else there is to say.
        faults: What was wrong, for people.
    """

    fault: str
    tries: int = 0
    lost: int = 0
    unnoticed: int = 0
    note: str = ""
    faults: list[str] = field(default_factory=list)

    def expect_none(self, faults: Sequence[str]) -> None:
        """Count one try, and what was lost in it."""
        self.tries += 1
        self.lost += bool(faults)
        self.faults += faults


def whole_build(cache: Path) -> StubBuild:
    """The build that all caches below are of."""
    return StubBuild(cache=cache, rows=ROWS)


def fault_free_cache(path: Path) -> Path:
    """The same cache, every byte of which is in use."""
    fill_cache(make_cache(path), ROWS, shard_rows=4)
    return path


def next_build_fails(cache: Path) -> list[str]:
    """What is wrong once the build has been run again; nothing may be."""
    try:
        with through(Recorder()):  # without waiting for a disk
            built = whole_build(cache).run()
        found = read_everything(cache)["train"]
        if set(found.tolist()) != {row.key.rstrip(b"\0") for row in ROWS} or len(found) != len(ROWS):
            return ["the next build is not complete"]
        return [f"{built.path.name}: {reason.reason}" for reason in built.shards.unusable()]
    except DpoCacheError as error:
        return [f"the next build fails: {error.found}"]


def kills(folder: Path, tries: int, *, seed: int = 0) -> Trials:
    """SIGKILL at random moments of builds, each beginning where the last one ended."""
    trials = Trials(fault="SIGKILL at a random moment of a build (stand-in for the model)")
    moments = random.Random(seed)
    claimed = 0
    with StubProcesses() as processes:
        for start in range(0, tries, ROUND):
            cache = folder / f"killed-{start}"
            claims: list[Claim] = []
            intended: list[Claim] = []  # by builds that died, perhaps between a pointer's rename and telling of it
            longest_s = 0.1
            for number in range(start, min(start + ROUND, tries)):
                order: dict[str, Any] = {"cache": str(cache), "seed": number // 2}
                [end] = processes.build(order, kill_after_s=moments.uniform(0, longest_s))
                longest_s *= 1.1 if end.code else 0.8  # so that they die all along the way
                claims += end.claims
                intentions = stub_build(**order).intentions()
                told = any(claim[0] == "mixture" for claim in end.claims)
                intended = intentions if told else intended + intentions
                said = [] if end.code in (0, -9) else [end.said]
                trials.expect_none(said + faults_of(cache, claims, later=intended))
            [end] = processes.build(order)
            claims += end.claims
            index = ReferenceCache.open(cache).shards.key_index()
            twice = [f"{index.num_duplicates} rows were scored twice"] if index.num_duplicates else []
            trials.faults += (found := faults_of(cache, claims) + twice + ([end.said] if end.code else []))
            trials.lost += bool(found)
            claimed += len(claims)
            shutil.rmtree(cache)
    trials.note = f"{claimed:,} files were reported as finished; all are there"
    return trials


def recorded_build(folder: Path) -> list[Operation]:
    """The file operations of a whole build in ``folder``."""
    folder.mkdir(exist_ok=True)
    recorder = Recorder()
    with through(recorder):
        whole_build(folder / "cache").run(recorder.claim)
    return recorder.operations


def power_cuts(folder: Path) -> Trials:
    """Every state that a power cut during a build can leave."""
    operations = recorded_build(folder)
    trials = through_states(folder, operations)
    trials.note = f"{sum(operation.kind != 'claim' for operation in operations)} recorded operations"
    return trials


def through_states(folder: Path, operations: Sequence[Operation], *, limit: int | None = None) -> Trials:
    """Look at every state that a power cut during these operations in ``folder`` can leave, or the first of them."""
    trials = Trials(fault="power cut: every point × every subset of what was not synced × absent, torn, whole")
    for number, state in enumerate(itertools.islice(crash_states(operations), limit)):
        place = folder / f"cut-{number}"
        place.mkdir()
        state.put(folder, place)
        faults = faults_of(place / "cache", state.claims, later=state.later)
        trials.expect_none(faults or next_build_fails(place / "cache"))
        shutil.rmtree(place)
    return trials


def full_disk_at_every_operation(folder: Path, *, for_good: bool) -> Trials:
    """ENOSPC at one operation after another of a build."""
    trials = Trials(fault=f"full disk injected at every operation, {'from there on' if for_good else 'once'}")
    length = sum(operation.kind != "claim" for operation in recorded_build(folder / "whole"))
    for place in range(length):
        cache = folder / f"full-{place}"
        recorder = Recorder(fail_at=place, failures=10**9 if for_good else 1)
        said = ["the build did not notice"]
        with through(recorder):
            try:
                whole_build(cache).run(recorder.claim)
            except DpoCacheError as error:
                said = [] if "No space left" in error.found else [error.found]
        claims = [list(operation.claim) for operation in recorder.operations if operation.kind == "claim"]
        faults = faults_of(cache, claims, later=whole_build(cache).intentions())
        trials.expect_none(said + faults + next_build_fails(cache))
        shutil.rmtree(cache)
    return trials


def mounted(folder: Path, options: str) -> list[str]:
    """A command prefix: what follows sees a file system of its own in ``folder``, which is gone with it."""
    return [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o "$1" none "$0" && shift && exec "$@"',
        str(folder),
        options,
    ]


def can_mount(folder: Path) -> bool:
    """Whether this machine lets us."""
    return os.system(f"unshare -rm mount -t tmpfs none {folder} 2>/dev/null") == 0


def full_disks(folder: Path, sizes_kib: Sequence[int]) -> Trials:
    """Builds on file systems too small for them, then made larger."""
    trials = Trials(fault="full disk: a build on a tmpfs that is too small, made larger afterwards")
    stopped = 0
    for size in sizes_kib:
        with StubProcesses(mounted(folder, f"size={size}k")) as processes:
            cache = folder / "cache"
            order: dict[str, Any] = {"cache": str(cache), "rows": (0, 120)}
            [full] = processes.build(order)
            stopped += full.code == 1
            said = [] if full.code in (0, 1) and (not full.code or "No space left" in full.said) else [full.said]
            said += processes.faults(cache, full.claims, stub_build(**order).intentions())
            processes.run("mount", "-o", "remount,size=64m", str(folder))
            [again] = processes.build(order)
            said += [again.said] if again.code else []
            trials.expect_none(said + processes.faults(cache, full.claims[:-1] + again.claims))
    trials.note = f"{stopped} builds stopped with a clear error"
    return trials


def read_only_folders(folder: Path) -> Trials:
    """Builds and readers on a file system that becomes read-only."""
    trials = Trials(fault="read-only folder: no cache yet, a partial cache, a complete one")
    for rows in (0, 12, 24):
        with StubProcesses(mounted(folder, "size=64m")) as processes:
            cache = folder / "cache"
            order: dict[str, Any] = {"cache": str(cache), "rows": (0, 24)}
            ends = processes.build({**order, "rows": (0, rows)}) if rows else []
            processes.run("mount", "-o", "remount,ro", str(folder))
            [tried] = processes.build(order)
            is_refused = tried.code == 1 and "Read-only file system" in tried.said
            is_right = is_refused or (rows == 24 and tried.code == 0)  # there is nothing left to write
            said = [] if is_right else [tried.said or "no error"]
            said += processes.faults(cache, [claim for end in ends for claim in end.claims])
            processes.run("mount", "-o", "remount,rw", str(folder))
            [again] = processes.build(order)
            said += [again.said] if again.code else []
            trials.expect_none(said + processes.faults(cache, again.claims))
    return trials


def builders_at_once(folder: Path, number: int, *, overlapping: bool) -> Trials:
    """Builders of as many mixtures in one cache that does not exist yet."""
    trials = Trials(fault=f"{number} builders at once on {'overlapping' if overlapping else 'the same'} rows")
    cache = folder / f"together-{number}-{overlapping}"
    orders: list[dict[str, Any]] = [
        {
            "cache": str(cache),
            "mixture": f"m{builder}",
            "rows": (builder * 6 % 60, builder * 6 % 60 + 48) if overlapping else (0, 48),
            "unit_rows": 4 + builder % 3 if overlapping else 4,
        }
        for builder in range(number)
    ]
    with StubProcesses() as processes:
        ends = processes.build(*orders)
    said = [end.said for end in ends if end.code]
    said += faults_of(cache, [claim for end in ends for claim in end.claims])
    found = read_everything(cache)
    union: set[bytes] = set()
    for order in orders:
        build = stub_build(**order)
        asked = sorted(row.key.rstrip(b"\0") for row in build.rows)
        union.update(asked)
        if sorted(found[build.mixture].tolist()) != asked:
            said.append(f"mixture {build.mixture} lacks rows or has some twice")
    index = ReferenceCache.open(cache).shards.key_index()
    if set(index.keys.tolist()) != union:
        said.append("rows are lost")
    trials.expect_none(said)
    trials.tries = number
    trials.note = f"{len(union)} rows once each in the index, {index.num_duplicates} scored by several builders"
    shutil.rmtree(cache)
    return trials


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One change of one file of a cache: a bit flipped, or all from a byte on cut off."""

    path: Path
    bit: int | None = None
    cut_at: int = 0

    @contextmanager
    def done(self) -> Iterator[None]:
        """The file is damaged inside and as before afterwards."""
        whole = self.path.read_bytes()
        damaged = bytearray(whole)
        if self.bit is None:
            del damaged[self.cut_at :]
        else:
            damaged[self.bit // 8] ^= 1 << self.bit % 8
        self.path.write_bytes(damaged)
        try:
            yield
        finally:
            self.path.write_bytes(whole)


def files_of(cache: Path) -> list[Path]:
    """All files that count."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.parent.name != "tmp")


def random_flips(cache: Path, tries: int, *, seed: int = 0) -> Iterator[Damage]:
    """Flips anywhere in a cache, each bit of it as likely as any other."""
    files = files_of(cache)
    random_state = np.random.RandomState(seed)
    sizes = np.array([path.stat().st_size for path in files], dtype=float)
    for file in random_state.choice(len(files), size=tries, p=sizes / sizes.sum()):
        yield Damage(path=files[file], bit=int(random_state.randint(int(sizes[file]) * 8)))


def random_cuts(cache: Path, tries: int, *, seed: int = 0) -> Iterator[Damage]:
    """Truncations, every file as likely as any other."""
    files = files_of(cache)
    random_state = np.random.RandomState(seed)
    for file in random_state.randint(len(files), size=tries):
        yield Damage(path=files[file], cut_at=int(random_state.randint(files[file].stat().st_size)))


def all_flips(path: Path, *, footer: bool = False) -> Iterator[Damage]:
    """Every bit of a file, or of a Parquet file's footer, its length and the magic number at the end."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little") + 8 if footer else len(content)
    for bit in range((len(content) - length) * 8, len(content) * 8):
        yield Damage(path=path, bit=bit)


def damages(fault: str, cache: Path, damage: Iterator[Damage], *, build_every: int) -> Trials:
    """Damage a cache and read everything: it must be noticed; every so often the build is run again on a copy."""
    trials = Trials(fault=fault)
    rebuilt = 0
    for change in damage:
        with change.done():
            trials.tries += 1
            try:
                read_everything(cache)
            except DpoCacheError:
                pass
            else:
                trials.unnoticed += 1
                trials.faults.append(f"unnoticed: {change}")
            if trials.tries % build_every == 0:
                copy = cache.parent / "damaged"
                shutil.copytree(cache, copy)
                found = next_build_fails(copy)
                shutil.rmtree(copy)
                trials.lost += bool(found)
                trials.faults += found
                rebuilt += 1
    trials.note = f"{trials.tries - trials.unnoticed:,} found; the build was run again after {rebuilt:,} of them"
    return trials


def lie(cache: Path, chance: random.Random) -> str:
    """Make a cache claim something else under right digests and seals, as a stranger would; says what.

    One file is changed: bytes of a Parquet file, or a member of a JSON file. What names it is made to fit.
    """
    pointer = cache / "mixtures" / "train.json"
    path = chance.choice(files_of(cache))
    if path.suffix == ".json":
        changed = _changed_json(json.loads(path.read_bytes()), chance)
        if path.name == "cache.json" and isinstance(changed.get("identity"), dict) and chance.random() < 0.9:
            changed["reference_id"] = hashlib.sha256(canonical_bytes(changed["identity"])).hexdigest()
        _seal(path, changed)
        return f"{path.name}: {changed}"[:2000]
    content = _changed_bytes(path.read_bytes(), chance)
    old, new = path.stem, hashlib.sha256(content).hexdigest()
    path.unlink()
    path.with_name(f"{new}.parquet").write_bytes(content)
    text = re.sub(rf"\b{old}\b", new, pointer.read_text())
    stated = json.loads(text)
    if path.parent.name == "mixtures":
        stated["table"]["num_bytes"] = len(content)
    else:
        stated["shards"] = [
            [sha256, rows, len(content) if sha256 == new else size] for sha256, rows, size in stated["shards"]
        ]
    _seal(pointer, stated)
    return f"{path.name}: {content.hex()[-4000:]}"


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**64, 1.5, 1e308, "", "a", "../x", "a" * 5000, "\ud800", [], {}, [[]],
    [1] * 100, {"a": {}}, [["0" * 64, 1, 1]], "0" * 64, [None],
)  # fmt: skip


def _changed_json(value: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy with one member somewhere in it changed, gone or new."""
    value = {name: member for name, member in value.items() if name != "sha256"}
    holder: Any = value
    while True:
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not places:
            break
        place = chance.choice(places)
        if isinstance(holder[place], dict | list) and chance.random() < 0.7:
            holder = holder[place]
            continue
        if chance.random() < 0.15:
            del holder[place]
        else:
            holder[place] = chance.choice(STRANGE)
        break
    if chance.random() < 0.1:
        value["new"] = chance.choice(STRANGE)
    return value


def _seal(path: Path, value: dict[str, Any]) -> None:
    body = canonical_bytes({name: member for name, member in value.items() if name != "sha256"})
    path.write_bytes(b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:])


def _changed_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, put in, taken out or repeated, in the footer more often than not."""
    changed = bytearray(content)
    length = int.from_bytes(content[-8:-4], "little") + 8
    for _ in range(chance.choice((1, 1, 2, 8))):
        in_footer = chance.random() < 0.7
        place = chance.randrange(max(0, len(changed) - length) if in_footer else 0, len(changed))
        kind = chance.randrange(5)
        if kind <= 1:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            changed[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 3:
            del changed[place : place + chance.randrange(1, 9)]
            if in_footer and chance.random() < 0.8:
                _fit_footer(changed, content)
        else:
            start = chance.randrange(len(content))
            changed[place:place] = content[start : start + chance.randrange(1, 33)]
            if in_footer and chance.random() < 0.8:
                _fit_footer(changed, content)
        if len(changed) < 16:
            break
    return bytes(changed)


def _fit_footer(changed: bytearray, content: bytes) -> None:
    """State the footer's length so that its start stays where it was."""
    length = int.from_bytes(content[-8:-4], "little") + len(changed) - len(content)
    if len(changed) > 8 and length > 0:
        changed[-8:] = length.to_bytes(4, "little") + b"PAR1"


def read_as_a_stranger(cache: Path) -> bool:
    """Go through everything that opens a cache; False where it was refused as it must be."""
    try:
        opened = ReferenceCache.open(cache)
        opened.shards.unusable()
        opened.shards.key_index()
        read_everything(cache)
    except DpoCacheError:
        return False
    return True


def lies(folder: Path, tries: int, *, seed: int = 0) -> Trials:
    """Files of a stranger under right digests: only our own error may come of them."""
    trials = Trials(fault="false content under valid digests and seals (fuzzing of JSON, footers and pages)")
    whole = fault_free_cache(folder / "honest")
    chance = random.Random(seed)
    refused = 0
    for number in range(tries):
        cache = folder / "lying"
        shutil.copytree(whole, cache)
        told = lie(cache, chance)
        trials.tries += 1
        try:
            refused += not read_as_a_stranger(cache)
        except Exception as error:  # anything but a DpoCacheError is what we look for
            trials.lost += 1
            trials.faults.append(f"try {number}: {error!r} of {told}")
        shutil.rmtree(cache)
    trials.note = f"{refused:,} refused with a clear error, the others change nothing that is checked"
    return trials


def real_kills(folder: Path, tries: int, *, seed: int = 0) -> Trials:
    """SIGKILL at random moments of ``dpo-cache build`` with a tiny model and two workers."""
    from tiny_model import message_pairs, write_rows, write_tiny_model

    trials = Trials(fault="SIGKILL at a random moment of dpo-cache build (tiny model, 2 workers)")
    dataset = write_rows(folder / "pairs.jsonl", message_pairs(2400))
    cache = folder / "real"
    options = ("--dataset", dataset, "--num-workers", 2, "--cache", cache)
    command = dpo_cache("build", "--model", write_tiny_model(folder / "model"), *options)
    moments = random.Random(seed)
    kept: set[str] = set()
    for number in range(tries):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while number % 4 and process.poll() is None and len(list(cache.glob("shards/*.parquet"))) <= len(kept):
            time.sleep(0.01)  # most of a short build is its start; three in four die while it scores
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.5 if number % 4 else 10))
        process.kill()
        process.wait()
        now = {path.stem for path in cache.glob("shards/*.parquet")}
        trials.expect_none(faults_of(cache, [["shard", name] for name in kept]) if now or kept else [])
        kept = now
    report = run(command)
    pairs = len(logps_by_key(cache))
    if (report["training_pairs"], pairs) != (2400, 2400):
        trials.faults.append(f"the last build ended with {pairs} pairs")
        trials.lost += 1
    trials.note = f"the last build reused {report['pairs_reused']:,} of 2,400 pairs"
    return trials


def stray_shards(folder: Path) -> Trials:
    """A shard of another reference among ours, intact and under a right name."""
    trials = Trials(fault="a stray shard of another reference, with the same rows")
    whole_build(folder / "ours").run()
    other = make_cache(folder / "other", attention="eager")
    for start in range(0, len(ROWS), 4):
        stray = other.shards.write(ROWS[start : start + 4])
        shutil.copy(other.path / "shards" / stray.file_name, folder / "ours" / "shards")
        ours = ReferenceCache.open(folder / "ours")
        said = [] if len(ours.shards.unusable()) == start // 4 + 1 else ["not noticed"]
        try:
            read_everything(ours.path)
        except DpoCacheError as error:
            said.append(f"it spoils the mixture: {error.found}")
        built = whole_build(ours.path).run()
        if any(shard.file_name == stray.file_name for shard in built.read_mixture("train").shards):
            said.append("the next build uses it")
        trials.expect_none(said)
    trials.note = "named and never read; ours are used"
    return trials

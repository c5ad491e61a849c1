"""Stage one without a model: builds a cache of made-up rows, quickly enough to be killed a thousand times.

Started as a program it takes orders on its standard input, one JSON object a line, and answers each on its standard
output; see :class:`StubProcesses`, the other end. Every build and every check is a real process, forked from one
that has only imported things.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cache_factory import make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.example_key import Keys, keys_array
from dpo_cache.pipeline.cache.mixture_check import check_mixture
from dpo_cache.pipeline.cache.mixture_table import training_set_digest
from dpo_cache.pipeline.cache.pair_stream import PairStream
from dpo_cache.pipeline.cache.scored_pair import ScoredPair

Claim = list[str]
"""``["cache"]``, ``["shard", digest]`` or ``["mixture", name, digest]``, the digest empty once it is retired."""
Claimed = Callable[[Claim], None]


def _unheard(claim: Claim) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class StubBuild:
    """One build: which rows are asked for, under which mixture name, cut into units of which size."""

    cache: Path
    rows: list[ScoredPair]
    mixture: str = "train"
    unit_rows: int = 4

    def run(self, claimed: Claimed = _unheard) -> ReferenceCache:
        """Score what is missing and point at all of it; does what ``stages/build.py`` does with a cache."""
        cache = make_cache(self.cache)
        claimed(["cache"])
        with cache.building(self.mixture):
            unusable = [shard.path for shard in cache.shards.unusable()]
            known = cache.shards.key_index(without=unusable)
            places = known.find(keys_array([row.key for row in self.rows]))
            missing = [row for row, place in zip(self.rows, places, strict=True) if place < 0]
            for start in range(0, len(missing), self.unit_rows):
                shard = cache.shards.write(missing[start : start + self.unit_rows])
                claimed(["shard", shard.sha256])
            if not self._is_up_to_date(cache):
                self._point_at(cache, len(self.rows) // 2, unusable, claimed)
                self._point_at(cache, len(self.rows), unusable, claimed)
            claimed(["mixture", self.mixture, cache.read_mixture(self.mixture).digest])
        return cache

    def intentions(self) -> list[Claim]:
        """The claims on its mixture that a build from nothing makes."""
        return [["mixture", self.mixture, self._digest(number)] for number in (len(self.rows) // 2, len(self.rows))]

    def _digest(self, num_rows: int) -> str:
        rows = mixture_rows(self.rows[:num_rows])
        return training_set_digest(rows.example_keys[np.lexsort((rows.example_keys, rows.prompt_hashes))])

    def _is_up_to_date(self, cache: ReferenceCache) -> bool:
        try:
            mixture = cache.read_mixture(self.mixture)
            mixture.table.verify()
        except DpoCacheError:
            return False
        usable = set(cache.shards.paths()) - {shard.path for shard in cache.shards.unusable()}
        named = set(map(cache.shards.path_of, mixture.shards))
        return mixture.digest == self._digest(len(self.rows)) and named <= usable

    def _point_at(self, cache: ReferenceCache, num_rows: int, unusable: list[Path], claimed: Claimed) -> None:
        mixture = cache.write_mixture(
            self.mixture,
            mixture_rows(self.rows[:num_rows]),
            key_index=cache.shards.key_index(without=unusable),
            tokenization={},
            sources=[{"path": "made up"}],
            dropped={},
        )
        claimed(["mixture", self.mixture, mixture.digest])


def read_everything(path: Path) -> dict[str, Keys]:
    """The keys of every mixture of a cache, after every check and with every row streamed.

    Raises:
        DpoCacheError: Something is damaged.
    """
    cache = ReferenceCache.open(path)
    found: dict[str, Keys] = {}
    for name in cache.mixture_names():
        mixture = cache.read_mixture(name)
        check_mixture(cache, mixture)
        stream = PairStream(cache, mixture)
        try:
            stream.read(np.arange(mixture.num_pairs))
        finally:
            stream.close()
        found[name] = mixture.table.column("example_key")
    return found


def faults_of(path: Path, claims: list[Claim], *, later: list[Claim] | None = None) -> list[str]:
    """What is wrong with a cache after a fault: nothing damaged may be visible, nothing claimed may be lost.

    Args:
        path: The cache.
        claims: What builders were told is durable, in order.
        later: What the same builders went on to do; a pointer may already be that far.
    """
    if not (path / "cache.json").exists():
        return [f"the cache is lost, with {len(claims)} claims"] if claims else []
    found: list[str] = []
    try:
        cache = ReferenceCache.open(path)
        found += [shard.reason for shard in cache.shards.unusable()]
        read_everything(path)
        digests = {name: cache.read_mixture(name).digest for name in cache.mixture_names()}
    except DpoCacheError as error:
        return [*found, error.found]
    shards = {shard.stem for shard in cache.shards.paths()}
    found += [f"shard {claim[1]} is lost" for claim in claims if claim[0] == "shard" and claim[1] not in shards]
    for name, digest in {claim[1]: claim[2] for claim in claims if claim[0] == "mixture"}.items():
        accepted = {digest} | {claim[2] for claim in later or [] if claim[:2] == ["mixture", name]}
        if digests.get(name, "") not in accepted:
            found.append(f"mixture {name} is lost or not the one last written")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a process ended: its exit code, -9 where it was killed; what it said; what it was told is durable."""

    code: int
    said: str
    claims: list[Claim]


class StubProcesses:
    """Starts builds and checks as real processes; a context manager.

    Args:
        prefix: A command in front of the interpreter, such as one that mounts something first.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def build(self, *builds: dict[str, Any], kill_after_s: float | None = None) -> list[End]:
        """Run builds at once, each given as :func:`stub_build` takes it; kill all of them after a time."""
        return [End(**end) for end in self._order({"builds": builds, "kill_after_s": kill_after_s})]

    def faults(self, cache: Path, claims: list[Claim], later: list[Claim] | None = None) -> list[str]:
        """:func:`faults_of`, in a process of its own."""
        faults: list[str] = self._order({"cache": str(cache), "claims": claims, "later": later})
        return faults

    def run(self, *command: str) -> None:
        """Run a command where the builds run."""
        assert self._order({"command": command}) == 0

    def close(self) -> None:
        """End the process that forks."""
        self._process.communicate()
        assert self._process.returncode == 0

    def __enter__(self) -> StubProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def stub_build(cache: str, *, seed: int = 0, rows: tuple[int, int] = (0, 24), **others: Any) -> StubBuild:
    """A build of some of the rows of a seed."""
    return StubBuild(cache=Path(cache), rows=make_rows(rows[1], seed=seed)[rows[0] :], **others)


def _obey(order: dict[str, Any]) -> Any:
    if "command" in order:
        return subprocess.run(order["command"], check=False).returncode
    if "cache" in order:
        check = _Fork(lambda tell: tell(faults_of(Path(order["cache"]), order["claims"], later=order["later"])))
        return check.end()["claims"][0]
    forks = [_Fork(stub_build(**build).run) for build in order["builds"]]
    if order["kill_after_s"] is not None:
        time.sleep(order["kill_after_s"])
        for fork in forks:
            os.kill(fork.process, signal.SIGKILL)
    return [fork.end() for fork in forks]


class _Fork:
    """A process that does one thing and tells, line by line, what it has done."""

    def __init__(self, work: Callable[[Callable[[Any], None]], object]) -> None:
        self._told, telling = os.pipe()
        self._said, saying = os.pipe()
        self.process = os.fork()
        if not self.process:
            try:
                work(lambda told: _write(telling, json.dumps(told) + "\n"))
                os._exit(0)
            except DpoCacheError as error:
                _write(saying, str(error))
                os._exit(1)
            except BaseException as error:
                _write(saying, repr(error))
            finally:
                os._exit(2)
        os.close(telling)
        os.close(saying)

    def end(self) -> dict[str, Any]:
        with os.fdopen(self._told) as told, os.fdopen(self._said) as said:
            claims, last_words = [json.loads(line) for line in told], said.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return {"code": code, "said": last_words, "claims": claims}


def _write(file: int, text: str) -> None:
    os.write(file, text.encode())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as warm_up:  # what libraries do at first use, forks need not do again
        StubBuild(cache=Path(warm_up) / "cache", rows=make_rows(2)).run()
        read_everything(Path(warm_up) / "cache")
    for line in sys.stdin:
        print(json.dumps(_obey(json.loads(line))), flush=True)

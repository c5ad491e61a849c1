"""Stage one without a model: builds a cache of made-up rows, quickly enough to be killed a thousand times.

Started as a program it takes orders on its standard input, one a line, and forks one real process for each:
``kill CACHE SEED SECONDS`` kills it with SIGKILL after that time, ``build CACHE SEED`` lets it end. The answer on
standard output is ``[killed, claims]`` as JSON: a claim is what the process was told is durable.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cache_factory import make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.example_key import Keys
from dpo_cache.pipeline.cache.mixture_check import check_mixture
from dpo_cache.pipeline.cache.pair_stream import PairStream
from dpo_cache.pipeline.cache.shard_file import ScoredPair

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
            unusable = [shard.path for shard in cache.usable_shards().unusable]
            known = cache.key_index(without=unusable)
            missing = [row for row in self.rows if row.key not in known]
            for start in range(0, len(missing), self.unit_rows):
                shard = cache.write_shard(missing[start : start + self.unit_rows])
                claimed(["shard", shard.sha256])
            if not self._is_up_to_date(cache, {shard.sha256 for shard in cache.usable_shards().usable}):
                self._point_at(cache, len(self.rows) // 2, unusable, claimed)
                self._point_at(cache, len(self.rows), unusable, claimed)
            claimed(["mixture", self.mixture, cache.read_mixture(self.mixture).digest])
        return cache

    def _is_up_to_date(self, cache: ReferenceCache, usable: set[str]) -> bool:
        try:
            mixture = cache.read_mixture(self.mixture)
            mixture.table.verify()
        except DpoCacheError:
            return False
        same = np.array_equal(np.sort(mixture.rows().example_keys), np.sort(mixture_rows(self.rows).example_keys))
        return same and usable >= {shard.sha256 for shard in mixture.shards}

    def _point_at(self, cache: ReferenceCache, num_rows: int, unusable: list[Path], claimed: Claimed) -> None:
        mixture = cache.write_mixture(
            self.mixture,
            mixture_rows(self.rows[:num_rows]),
            key_index=cache.key_index(without=unusable),
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
        found += [shard.reason for shard in cache.usable_shards().unusable]
        read_everything(path)
        digests = {name: cache.read_mixture(name).digest for name in cache.mixture_names()}
    except DpoCacheError as error:
        return [*found, error.found]
    shards = {shard.stem for shard in cache.shard_paths()}
    found += [f"shard {claim[1]} is lost" for claim in claims if claim[0] == "shard" and claim[1] not in shards]
    for name, digest in {claim[1]: claim[2] for claim in claims if claim[0] == "mixture"}.items():
        accepted = {digest} | {claim[2] for claim in later or [] if claim[:2] == ["mixture", name]}
        if digests.get(name, "") not in accepted:
            found.append(f"mixture {name} is lost or not the one last written")
    return found


def _ordered(cache: Path, seed: int, kill_after_s: float | None) -> tuple[bool, list[Claim]]:
    """Build in a process of its own, killed or not."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            build = StubBuild(cache=cache, rows=make_rows(24, seed=seed))
            build.run(lambda claim: void(os.write(writing, json.dumps(claim).encode() + b"\n")))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as lines:
        claims = [json.loads(line) for line in lines]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a build ended with {status}")
    return os.WIFSIGNALED(status), claims


def void(_: object) -> None:
    """Drop a value."""


if __name__ == "__main__":
    for line in sys.stdin:
        order, folder, number, *seconds = line.split()
        print(
            json.dumps(_ordered(Path(folder), int(number), float(seconds[0]) if order == "kill" else None)), flush=True
        )

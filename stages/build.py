"""Stage one: score a preference dataset once with the reference and keep the log-probabilities.

Resolve the reference, tokenise, find what the cache does not hold, cut that into units, let one process a GPU score
them, and write the mixture's pointer last: its presence certifies that every row it names exists.

Under torchrun, the deepspeed launcher or srun, rank 0 does all of that and every rank runs one scoring process;
started alone, this process runs one for each GPU of the machine.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch.distributed import DistError

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache, refuse_other_content
from ..pipeline.cache.cache_json import CacheDescription
from ..pipeline.cache.key_index import KeyIndex
from ..pipeline.cache.mixture import check_name
from ..pipeline.data.dataset_source import DatasetSource, DatasetSpec, open_dataset
from ..pipeline.data.pair_tokenizer import PairTokenizer
from ..pipeline.scoring.quantization import require_bitsandbytes
from .build_config import BuildConfig
from .build_plan import ScoringPlan, cut_units
from .build_reference import BuildReference, resolve_reference
from .build_report import BuildReport
from .job_store import POLL_S, RUN_AGAIN, JobStore, store_lost
from .library_output import quiet_libraries
from .mixture_change import MixtureContent, mixture_content
from .pair_collection import CollectedPairs, collect_pairs
from .ranks import Ranks, ranks_from_environment
from .scoring_job import ScoringOutcome, follow_scoring, lead_scoring

SPOOL = "pairs.arrow"
VISIBLE_WITHIN_S = 120.0
"""NFS keeps what it knows of a folder for up to a minute."""


def build(config: BuildConfig) -> BuildReport | None:
    """Run stage one.

    Returns:
        What was done; None on ranks other than 0 of a launcher.

    Raises:
        DpoCacheError: A fault of the settings, the data, the model or the machine; all that was finished stays.
        KeyboardInterrupt: Asked to stop; all that was finished stays.
    """
    quiet_libraries()
    ranks = ranks_from_environment()
    if ranks is None or ranks.rank == 0:
        return Build(config, ranks).run()
    follow_scoring(ranks)
    return None


class Build:
    """One build, as its leading process sees it.

    Args:
        config: What to score, with which reference, into which cache.
        ranks: This process's place where a launcher started it.
    """

    def __init__(self, config: BuildConfig, ranks: Ranks | None) -> None:
        self._config = config
        self._ranks = ranks
        self._num_workers = ranks.num_ranks if ranks else config.num_workers or max(1, torch.cuda.device_count())
        self._started = time.monotonic()

    def run(self) -> BuildReport:
        """Collect, score, and write the mixture; or only say what would be done."""
        if self._ranks is None:
            return self._build(None)
        try:
            job = JobStore(self._ranks)
            with job.beating():
                try:
                    report = self._build(job)
                except BaseException as fault:
                    job.announce_end(f"rank 0 ended: {str(fault) or 'it was asked to stop'}")
                    raise
                job.announce_end()
                return report
        except DistError as lost:
            raise store_lost() from lost

    def _build(self, job: JobStore | None) -> BuildReport:
        self._reference = resolve_reference(self._config)
        numerics = f"{self._reference.identity.precision}, attention {self._reference.attention}"
        say(f"reference {self._reference.model.name}: {numerics}")
        return self._dry_run() if self._config.dry_run else self._run(job)

    def _run(self, job: JobStore | None) -> BuildReport:
        if self._reference.identity.quantization:
            require_bitsandbytes()
        cache = open_cache(self._config, self._reference, recorded=recorded_environment(self._reference))
        with cache.building(self._config.mixture), scratch_folder(cache.path / "tmp") as scratch:
            damaged = damaged_shards(cache)
            collected = self._collect(cache.shards.key_index(without=damaged), scratch)
            content = mixture_content(cache, self._config, collected, warn=say)
            outcome = self._score(cache, collected, scratch, job)
            wait_until_visible(cache, outcome.shards)
            mixture = self._write_mixture(cache, content, outcome, without=damaged)
            return self._report(collected, outcome, training_pairs=len(mixture.rows))

    def _dry_run(self) -> BuildReport:
        """Refuses what the build would refuse, and writes nothing."""
        check_name(self._config.mixture)
        refuse_other_content(self._config.cache)
        cache: ReferenceCache | None = None
        known: KeyIndex | None = None
        if (self._config.cache / "cache.json").exists():
            cache = ReferenceCache.open(self._config.cache)
            cache.require_reference(self._reference.identity)
            known = cache.shards.key_index(without=damaged_shards(cache))
        with tempfile.TemporaryDirectory(prefix="dpo-cache-") as scratch:
            collected = self._collect(known, Path(scratch))
        rows = mixture_content(cache, self._config, collected, warn=say).rows if cache else collected.rows
        return self._report(collected, ScoringOutcome(), training_pairs=len(rows))

    def _collect(self, known: KeyIndex | None, scratch: Path) -> CollectedPairs:
        datasets = open_datasets(self._config)
        collected = collect_datasets(self._config, self._reference, datasets, known=known, scratch=scratch)
        say(
            f"{collected.num_distinct} distinct pairs: {collected.num_reused} in the cache, "
            f"{len(collected.waiting)} to score"
        )
        return collected

    def _score(
        self, cache: ReferenceCache, collected: CollectedPairs, scratch: Path, job: JobStore | None
    ) -> ScoringOutcome:
        """Have the waiting pairs scored; without any, no model is loaded and no process started."""
        waiting = collected.waiting
        order, units = cut_units(waiting, num_workers=self._num_workers)
        if not units and job is None:
            return ScoringOutcome()
        plan = ScoringPlan(
            cache=str(cache.path.resolve()),
            model_folder=str(self._reference.model.folder),
            adapter_folder=str(self._reference.adapter.folder) if self._reference.adapter else None,
            quantization=self._reference.identity.quantization,
            dtype=self._reference.dtype,
            attention=self._reference.attention,
            trust_remote_code=self._config.trust_remote_code,
            zero_stage=self._config.zero_stage,
            tokens_per_batch=self._config.tokens_per_batch,
            spool=str((scratch / SPOOL).resolve()),
            order=waiting.spool_indices[order].tolist(),
            longest=int(waiting.spool_indices[waiting.lengths.argmax()]) if units else -1,
            units=units,
        )
        plan_path = scratch / "plan.json"
        plan.write(plan_path)
        return lead_scoring(
            job or JobStore(None),
            plan,
            plan_path,
            ranks=self._ranks,
            num_workers=self._num_workers,
            total_tokens=int(waiting.lengths.sum()),
        )

    def _write_mixture(
        self, cache: ReferenceCache, content: MixtureContent, outcome: ScoringOutcome, *, without: list[Path]
    ) -> MixtureContent:
        if outcome.nonfinite and not self._config.drop_nonfinite:
            named = ", ".join(key.hex() for key in outcome.nonfinite[:10])
            raise DpoCacheError(
                f"the reference gives {len(outcome.nonfinite)} pairs no finite log-probability: {named}",
                expected="finite values; all other pairs are scored and stay",
                next_step="look at those pairs and at the model; --drop-nonfinite leaves them out of the mixture",
            )
        content = content.without(outcome.nonfinite)
        content.write(cache, self._config.mixture, without=without)
        return content

    def _report(self, collected: CollectedPairs, outcome: ScoringOutcome, *, training_pairs: int) -> BuildReport:
        return BuildReport(
            cache=self._config.cache,
            mixture=self._config.mixture,
            dry_run=self._config.dry_run,
            training_pairs=training_pairs,
            distinct_pairs=collected.num_distinct,
            pairs_reused=collected.num_reused,
            pairs_scored=len(collected.waiting) - len(outcome.nonfinite),
            reference_forwards=outcome.forwards,
            tokens=outcome.tokens,
            seconds=time.monotonic() - self._started,
            scoring_seconds=outcome.seconds,
            forward_seconds=outcome.forward_seconds,
            forward_share=outcome.forward_share,
            dropped=collected.dropped,
            truncated=collected.truncated,
            warnings=outcome.faults,
        )


def open_cache(config: BuildConfig, reference: BuildReference, *, recorded: dict[str, Any]) -> ReferenceCache:
    """The cache of a build, begun where there is none; says so where it was begun with another vocabulary.

    Args:
        config: Names its folder.
        reference: The reference, and how its tokens are made.
        recorded: What a new cache keeps about its origin.

    Raises:
        DpoCacheError: It is one of another reference, or no cache.
    """
    vocabulary = PairTokenizer(reference.tokenization).description()["vocabulary_sha256"]
    cache = ReferenceCache.create(
        config.cache,
        CacheDescription(identity=reference.identity, vocabulary_sha256=vocabulary, recorded=recorded),
    )
    if cache.vocabulary_sha256 != vocabulary:
        say(
            f"warning: the tokenizer's vocabulary ({vocabulary[:12]}…) is not the one this cache was begun with "
            f"({cache.vocabulary_sha256[:12]}…): the same ids may stand for other words"
        )
    return cache


def open_datasets(config: BuildConfig) -> list[DatasetSource]:
    """The datasets of a build, in order."""
    return [open_dataset(DatasetSpec.parse(text)) for text in config.dataset]


def collect_datasets(
    config: BuildConfig,
    reference: BuildReference,
    datasets: Sequence[DatasetSource],
    *,
    known: KeyIndex | None,
    scratch: Path,
) -> CollectedPairs:
    """Tokenise the datasets of a build; the tokens of pairs that are not ``known`` lie in ``scratch / SPOOL`` then."""
    return collect_pairs(
        datasets,
        reference.tokenization,
        known=known,
        spool=scratch / SPOOL,
        max_unusable_share=config.max_unusable_share,
        say_unusable=say if config.verbose else None,
    )


def recorded_environment(reference: BuildReference) -> dict[str, Any]:
    """What stands beside a reference's identity, for people: names and versions, none of which is compared."""
    libraries = ["dpo-cache", "torch", "transformers", "pyarrow"]
    libraries += ["bitsandbytes"] if reference.identity.quantization else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {**reference.names(), "device": device, "libraries": {name: version(name) for name in libraries}}


def damaged_shards(cache: ReferenceCache) -> list[Path]:
    """Shards that cannot be relied on, each named; their pairs are scored again."""
    survey = cache.shards.survey()
    for shard in survey.unusable:
        say(f"warning: {shard.path.name} is not used: {shard.reason}")
    return [shard.path for shard in survey.unusable]


def wait_until_visible(cache: ReferenceCache, shards: Collection[str]) -> None:
    """Wait for shards that other machines wrote: a shared file system may show them late.

    Raises:
        DpoCacheError: Some are still not there after two minutes.
    """
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while hidden := set(shards) - {path.name for path in cache.shards.paths()}:
        if time.monotonic() > deadline:
            raise DpoCacheError(
                f"{len(hidden)} shards that scoring processes wrote are not to be seen in {cache.path}: {min(hidden)}",
                expected="a cache folder on a file system that all nodes share, and that nobody clears meanwhile",
                next_step=RUN_AGAIN,
            )
        time.sleep(POLL_S)


@contextmanager
def scratch_folder(temporary_folder: Path) -> Iterator[Path]:
    """A folder for this build's spool and plan, gone when the build ends."""
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=temporary_folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(message: str) -> None:
    """Tell the person at the terminal."""
    click.echo(message, err=True)

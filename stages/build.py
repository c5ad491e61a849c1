"""Stage one: score a preference dataset once with the reference and keep the log-probabilities.

Resolve the reference, tokenise, find what the cache does not hold, cut that into units, let one process a GPU score
them, and write the mixture's pointer last: its presence certifies that every row it names exists.

Under torchrun, the deepspeed launcher or srun, rank 0 does all of that and every rank runs one scoring process;
started alone, this process runs one for each GPU of the machine.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.key_index import KeyIndex
from ..pipeline.cache.mixture import check_name
from ..pipeline.data.dataset_source import DatasetSource
from ..pipeline.scoring.quantization import require_bitsandbytes
from .building.build_cache import (
    damaged_shards,
    description_of,
    open_cache,
    recorded_environment,
    scratch_folder,
    wait_until_visible,
)
from .building.build_config import BuildConfig
from .building.build_datasets import SPOOL, collect_datasets, open_datasets
from .building.build_plan import ScoringPlan, cut_units
from .building.build_reference import resolve_reference
from .building.build_report import BuildReport
from .building.left_out import keys_by_reason, pairs_in_words
from .building.mixture_change import left_out_before, mixture_content
from .building.mixture_content import MixtureContent
from .building.pair_collection import CollectedPairs
from .building.row_counts import truncation_warning
from .console.library_output import quiet_libraries
from .console.terminal import say
from .processes.devices import num_processes
from .processes.job_store import JobStore, leading
from .processes.ranks import ranks_from_environment
from .scoring.scoring_job import ScoringOutcome, follow_scoring, lead_scoring


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
    num_workers = num_processes(config.num_workers, ranks, flag="--num-workers")
    if ranks is not None and ranks.rank != 0:
        follow_scoring(ranks)
        return None
    with leading(ranks) as job:
        return Build(config, job, num_workers=num_workers).run()


class Build:
    """One build, as its leading process sees it.

    Args:
        config: What to score, with which reference, into which cache.
        job: The store of the ranks that a launcher started; None without one.
        num_workers: How many processes score.

    Raises:
        DpoCacheError: The reference cannot be found.
    """

    def __init__(self, config: BuildConfig, job: JobStore | None, *, num_workers: int) -> None:
        self._started = time.monotonic()
        self._config = config
        self._job = job
        self._num_workers = num_workers
        self._reference = resolve_reference(config)

    def run(self) -> BuildReport:
        """Collect, score, and write the mixture; or only say what would be done."""
        identity = self._reference.identity
        say(f"reference {self._reference.model.name}: {identity.precision}, attention {identity.attention}")
        return self._dry_run() if self._config.dry_run else self._run()

    def _run(self) -> BuildReport:
        if self._reference.identity.quantization:
            require_bitsandbytes()
        ReferenceCache.planned(self._config.cache, description_of(self._reference))  # another's is refused first
        datasets = open_datasets(self._config)  # before there is a folder: a mistyped name leaves none behind
        cache = open_cache(self._config, self._reference, recorded=recorded_environment(self._reference))
        with cache.building(self._config.mixture), scratch_folder(cache.path / "tmp") as scratch:
            damaged = damaged_shards(cache)
            known = cache.shards.key_index(without=damaged)
            reusable = self._reusable(cache, known, damaged)
            collected = left_out_before(cache, self._config, self._collect(datasets, reusable, scratch))
            self._say_what_is_to_do(collected)
            if warning := self._truncation_warning(collected):
                say(f"warning: {warning}")  # here too: scoring may take hours
            content = mixture_content(cache, self._config, collected.content, known=known)
            outcome = self._score(cache, collected, scratch)
            wait_until_visible(cache, outcome.shards)
            self._refuse_unusable(outcome)
            content = content.without(keys_by_reason(outcome.unusable))
            if content.is_new or damaged:
                content.write(cache, self._config.mixture, key_index=cache.shards.key_index(without=damaged))
            return self._report(collected, content, outcome)

    def _dry_run(self) -> BuildReport:
        """Refuses what the build would refuse, and writes nothing."""
        check_name(self._config.mixture)
        cache = ReferenceCache.planned(self._config.cache, description_of(self._reference))
        known = reusable = None
        if cache is not None:
            damaged = damaged_shards(cache)
            known = cache.shards.key_index(without=damaged)
            reusable = self._reusable(cache, known, damaged)
        datasets = open_datasets(self._config)
        with tempfile.TemporaryDirectory(prefix="dpo-cache-") as scratch:
            collected = self._collect(datasets, reusable, Path(scratch))
        content = collected.content
        if cache is not None and known is not None:
            collected = left_out_before(cache, self._config, collected)
            content = mixture_content(cache, self._config, collected.content, known=known)
        self._say_what_is_to_do(collected)
        return self._report(collected, content, ScoringOutcome())

    def _reusable(self, cache: ReferenceCache, known: KeyIndex, damaged: list[Path]) -> KeyIndex:
        """The keys whose rows have all that this build asks for."""
        if not self._config.token_logps:
            return known
        return cache.shards.key_index(without=damaged, with_token_logps=True)

    def _collect(self, datasets: list[DatasetSource], reusable: KeyIndex | None, scratch: Path) -> CollectedPairs:
        return collect_datasets(self._config, self._reference, datasets, known=reusable, scratch=scratch)

    def _say_what_is_to_do(self, collected: CollectedPairs) -> None:
        say(
            f"{collected.num_distinct} distinct pairs: {collected.num_reused} in the cache, "
            f"{len(collected.waiting)} to score"
        )

    def _truncation_warning(self, collected: CollectedPairs) -> str | None:
        return truncation_warning(collected.truncated, num_rows=collected.num_usable_rows)

    def _score(self, cache: ReferenceCache, collected: CollectedPairs, scratch: Path) -> ScoringOutcome:
        """Have the waiting pairs scored; without any, no model is loaded and no process started."""
        waiting = collected.waiting
        order, units = cut_units(waiting, num_workers=self._num_workers)
        if not units and self._job is None:
            return ScoringOutcome()
        order_path = scratch / "order.npy"
        np.save(order_path, waiting.spool_indices[order])
        model, identity = self._reference.model, self._reference.identity
        plan = ScoringPlan(
            cache=str(cache.path.resolve()),
            model_folder=str(model.folder),
            adapter_folder=str(model.adapter_folder) if model.adapter else None,
            quantization=identity.quantization,
            dtype=identity.compute_dtype,
            attention=identity.attention,
            trust_remote_code=self._config.trust_remote_code,
            zero_stage=self._config.zero_stage,
            tokens_per_batch=self._config.tokens_per_batch,
            token_logps=self._config.token_logps,
            spool=str((scratch / SPOOL).resolve()),
            order=str(order_path.resolve()),
            longest=int(waiting.spool_indices[waiting.lengths.argmax()]) if units else None,
            units=units,
        )
        plan_path = scratch / "plan.json"
        plan.write(plan_path)
        return lead_scoring(
            self._job or JobStore(None),
            plan,
            plan_path,
            num_workers=self._num_workers,
            total_tokens=int(waiting.lengths.sum()),
        )

    def _refuse_unusable(self, outcome: ScoringOutcome) -> None:
        if outcome.unusable and not self._config.drop_nonfinite:
            raise DpoCacheError(
                f"the reference gives values that cannot be used: {pairs_in_words(outcome.unusable)}",
                expected="finite sums below zero; all other pairs are scored and stay",
                next_step="look at those pairs and at the model; --drop-nonfinite leaves them out of the mixture",
            )

    def _report(self, collected: CollectedPairs, content: MixtureContent, outcome: ScoringOutcome) -> BuildReport:
        warning = self._truncation_warning(collected)
        return BuildReport(
            cache=self._config.cache,
            mixture=self._config.mixture,
            dry_run=self._config.dry_run,
            training_pairs=len(content.rows),
            already_there=content.already_there,
            pairs_repeated=content.repeated,
            distinct_pairs=collected.num_distinct,
            pairs_reused=collected.num_reused,
            pairs_scored=len(collected.waiting) - len(outcome.unusable),
            reference_forwards=outcome.forwards,
            tokens=outcome.tokens,
            seconds=time.monotonic() - self._started,
            scoring_seconds=outcome.seconds,
            forward_seconds=outcome.forward_seconds,
            forward_share=outcome.forward_share,
            dropped=collected.content.without(keys_by_reason(outcome.unusable)).dropped,
            truncated=collected.truncated,
            usable_rows=collected.num_usable_rows,
            warnings=(*([warning] if warning else []), *outcome.faults),
        )

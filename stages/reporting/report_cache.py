"""What runs were trained from, as far as their records and the cache, if it is still there, can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ...pipeline.cache.scored_pair import ScoredPair
from ...pipeline.report.histogram import Histogram, histogram
from ...pipeline.report.page_content import CacheSection, PairGroup
from ...pipeline.report.run_record import RunRecord
from ..building.row_counts import dropped_in_words, source_in_words
from ..hub.recorded_reference import RecordedReference
from .report_pairs import OpenMixture, OpenMixtures, OutermostPairs

SAMPLED_BLOCKS = 16
"""Blocks of a mixture that are read for its distributions: some 16,000 pairs, however large it is."""


def cache_sections(runs: Sequence[RunRecord], mixtures: OpenMixtures) -> list[CacheSection]:
    """One section for each training set that the runs name."""
    distinct: dict[tuple[Any, ...], RunRecord] = {}
    for run in runs:
        if run.settings:
            named = [run.settings.get("cache"), run.settings.get("mixture")]
            distinct.setdefault((*map(str, named), str(run.resolved.get("mixture_digest"))), run)
    return [_section(run, mixtures) for run in distinct.values()]


def _section(run: RunRecord, mixtures: OpenMixtures) -> CacheSection:
    heading = f"The cache: {run.settings.get('cache')}, mixture {run.settings.get('mixture')}"
    recorded = [
        ("reference id", str(run.resolved.get("reference_id"))),
        ("mixture digest", str(run.resolved.get("mixture_digest"))),
        ("training pairs", str(run.resolved.get("num_pairs"))),
    ]
    try:
        opened = mixtures.open(run, "mixture")
        if opened.mixture.digest != run.resolved.get("mixture_digest"):
            raise DpoCacheError(f"mixture {opened.mixture.name} now holds other pairs")
        sample = _sample(opened)
    except DpoCacheError as fault:
        return CacheSection(
            heading=heading,
            facts=recorded,
            note=f"The cache cannot be read, so only what the run recorded is shown: {fault.found}.",
        )
    return CacheSection(
        heading=heading,
        facts=[*_facts(opened), *recorded[:2]],
        note="",
        sampled=sample.origin(opened.mixture.num_pairs),
        histograms=sample.histograms(),
        pairs=sample.pairs,
    )


def _facts(opened: OpenMixture) -> list[tuple[str, str]]:
    cache, mixture = opened.cache, opened.mixture
    reference = RecordedReference.of(cache.recorded)
    tokens = sum(mixture.num_ids.values())
    return [
        ("reference", reference.name + (f" @ {reference.commit}" if reference.commit else "")),
        ("weights", cache.identity.weights_sha256),
        ("numerics", f"{cache.identity.precision}, attention {cache.identity.attention}"),
        ("pairs", f"{mixture.num_pairs:,} ({mixture.num_distinct_pairs:,} distinct)"),
        ("tokens", f"{tokens:,}, {tokens / mixture.num_pairs:,.0f} per pair"),
        *[(name.replace("_", " "), str(value)) for name, value in mixture.settings.items() if value is not None],
        ("skipped rows", dropped_in_words(mixture.dropped) or "none"),
        *[("from", source_in_words(source)) for source in mixture.sources],
    ]


@dataclass(kw_only=True, slots=True)
class _Sample:
    """Numbers of some pairs, one array a block, shape (5, pairs): lengths of prompt, chosen and rejected, and the
    log-probabilities per token of chosen and rejected.
    """

    blocks: list[npt.NDArray[np.float64]] = field(default_factory=list)
    pairs: PairGroup | None = None

    def origin(self, num_pairs: int) -> str:
        """What stands under the distributions."""
        sampled = sum(block.shape[1] for block in self.blocks)
        if sampled == num_pairs:
            return f"Distributions over all {num_pairs:,} pairs. The outermost bars include everything beyond them."
        return (
            f"Distributions over a sample: {sampled:,} of {num_pairs:,} pairs, from {len(self.blocks)} places "
            "of the mixture, which is sorted by a hash. The outermost bars include everything beyond them."
        )

    def histograms(self) -> tuple[Histogram, ...]:
        """Lengths and log-probabilities, chosen beside rejected."""
        prompts, chosen, rejected, chosen_logps, rejected_logps = np.concatenate(self.blocks, axis=1)
        return (
            histogram("Length of the prompts", "tokens", {"prompt": prompts}),
            histogram("Length of the responses", "tokens", {"chosen": chosen, "rejected": rejected}),
            histogram(
                "Log-probability under the reference",
                "nats per token",
                {"chosen": chosen_logps, "rejected": rejected_logps},
            ),
        )


def _sample(opened: OpenMixture) -> _Sample:
    """Whole blocks at equal distances: their rows lie together in the shards, and a hash decided which they are."""
    mixture = opened.mixture
    num_blocks = -(-mixture.num_pairs // mixture.block_rows)
    sample, outermost = _Sample(), OutermostPairs(opened)
    for block in np.unique(np.linspace(0, num_blocks - 1, SAMPLED_BLOCKS).round().astype(np.int64)).tolist():
        start = block * mixture.block_rows
        rows = opened.stream.read(np.arange(start, min(start + mixture.block_rows, mixture.num_pairs)))
        numbers = np.array([_numbers(row) for row in rows]).T
        sample.blocks.append(numbers)
        *_, chosen_logps, rejected_logps = numbers
        for row, margin in zip(rows, (chosen_logps - rejected_logps).tolist(), strict=True):
            outermost.offer(row, margin)
    sample.pairs = outermost.group(
        "Pairs by the reference's own margin",
        "Before any training: the chosen response's log-probability per token minus the rejected one's, in nats, among "
        "the pairs counted above.",
    )
    return sample


def _numbers(row: ScoredPair) -> tuple[float, ...]:
    """A pair's column of a :class:`_Sample`."""
    lengths = (len(row.pair.prompt_ids), len(row.pair.chosen_ids), len(row.pair.rejected_ids))
    return (*lengths, row.ref_chosen_logps / row.chosen_tokens, row.ref_rejected_logps / row.rejected_tokens)

"""Score a sample of a cache again: how far the same reference is from its own values in batches of other shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ...errors import DpoCacheError, as_argument
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.key_index import KeyIndex
from ...pipeline.cache.scored_pair import VALUE_COLUMNS, ScoredPair
from ...pipeline.cache.shard_file import read_shard_rows
from ...pipeline.scoring.attention_names import GPU_KERNELS
from ...pipeline.scoring.batching import plan_batches
from ...pipeline.scoring.layout_choice import choose_layout
from ...pipeline.scoring.pair_scorer import PairScorer
from ...pipeline.scoring.reference_scorer import load_scorer, score_pairs
from ...pipeline.scoring.scoring_batch import Layout
from ...pipeline.scoring.side_bounds import long_side_bound, side_bounds
from ..console.library_output import quiet_libraries
from ..hub.model_folder import find_model_folder
from ..hub.model_identity import identity_to_compare
from ..hub.recorded_reference import RecordedReference
from ..processes.devices import device_of_rank, gpu_explained
from .rescore_report import RescoreReport, Spread
from .rescore_settings import RescoreSettings

TOKENS_PER_BATCH = 4096
"""Another budget than any build has by default, so that batches have other shapes."""


@gpu_explained(
    "verify on a machine with more GPU memory or, unless flex_attention computed the values, on the CPU: "
    "CUDA_VISIBLE_DEVICES= dpo-cache verify …"
)
def rescore(cache: ReferenceCache, index: KeyIndex, settings: RescoreSettings) -> RescoreReport:
    """Score a random sample of the indexed pairs with the recorded reference.

    Raises:
        DpoCacheError: The model is not there, or is another one than scored the cache, naming what differs.
    """
    quiet_libraries()
    device = device_of_rank(0)
    scorer = _load_reference(cache, settings, device)
    shards, rows = _sample(cache, index, settings)
    if not rows:
        raise DpoCacheError(f"{cache.path} holds no pair that could be scored again")
    pairs = [row.pair for row in rows]
    longest = max(pairs, key=lambda pair: pair.shared_prefix_tokens)
    layout = choose_layout(scorer, device=device, pairs=[longest])
    ways = {
        "one pair at a time, padded": (Layout.PADDED, [[number] for number in range(len(pairs))]),
        f"{TOKENS_PER_BATCH} tokens a batch, {layout}": (
            layout,
            plan_batches(pairs, layout, tokens_per_batch=TOKENS_PER_BATCH),
        ),
    }
    dtype = cache.identity.compute_dtype
    tokens_P4 = np.array([_tokens(row) for row in rows])
    bounds_P4 = side_bounds(dtype, tokens_P4)
    spreads, within = [], np.ones(len(rows), dtype=np.bool_)
    for way, (way_layout, batches) in ways.items():
        distances_P4 = np.full((len(rows), len(VALUE_COLUMNS)), np.nan)
        for members in batches:
            values = score_pairs(scorer, [pairs[member] for member in members], way_layout, device)
            distances_P4[members] = _distances([rows[member] for member in members], values) / tokens_P4[members]
        within &= (distances_P4 <= bounds_P4).all(axis=1)  # so that what is not a number is not within
        sides_P2 = distances_P4[:, :2]
        spreads.append(
            Spread(
                way=way,
                mean_per_token=float(sides_P2.mean()),
                max_per_token=float(sides_P2.max()),
                max_in_bounds=float((sides_P2 / bounds_P4[:, :2]).max()),
            )
        )
    outliers: dict[str, list[bytes]] = defaultdict(list)
    for number in np.flatnonzero(~within).tolist():
        outliers[shards[number]].append(rows[number].key)
    return RescoreReport(
        pairs=len(rows),
        dtype=dtype,
        bound_per_token=long_side_bound(dtype),
        spreads=spreads,
        outliers=dict(outliers),
    )


def _load_reference(cache: ReferenceCache, settings: RescoreSettings, device: torch.device) -> PairScorer:
    recorded = RecordedReference.of(cache.recorded)
    try:
        model = find_model_folder(settings.model, None) if settings.model else recorded.find_model()
    except DpoCacheError as error:
        raise DpoCacheError(
            f"the reference is not where it was when the cache was made: {error.found}",
            next_step=f"dpo-cache verify {as_argument(cache.path)} --rescore {settings.pairs} --model WHERE_IT_IS_NOW",
        ) from error
    if recorded.adapter:
        try:
            model = replace(model, adapter=recorded.find_adapter())
        except DpoCacheError as error:
            raise DpoCacheError(
                f"the reference's adapter is not where it was when the cache was made: {error.found}",
                next_step="put it back there, or a link to it in its place",
            ) from error
    ours = cache.identity
    if ours.remote_code_sha256 and not settings.trust_remote_code:
        raise DpoCacheError(
            "the values were computed by Python code that came with the model, and it does not run unasked",
            next_step=f"dpo-cache verify {as_argument(cache.path)} --rescore {settings.pairs} --trust-remote-code",
        )
    if ours.attention in GPU_KERNELS and device.type != "cuda":
        raise DpoCacheError(
            f"the values were computed with {ours.attention}, which runs on a GPU, and this is a {device.type}",
            next_step="--rescore on a machine with a GPU; all else that verify checks needs none",
        )
    cache.require_reference(identity_to_compare(model, ours, trust_remote_code=settings.trust_remote_code))
    return load_scorer(
        model.folder,
        dtype=ours.compute_dtype,
        attention=ours.attention,
        device=device,
        adapter=model.adapter_folder,
        quantization=ours.quantization,
        trust_remote_code=settings.trust_remote_code,
    )


def _sample(cache: ReferenceCache, index: KeyIndex, settings: RescoreSettings) -> tuple[list[str], list[ScoredPair]]:
    """Digests of the shards that hold the sampled rows, and the rows."""
    size = min(settings.pairs, len(index))
    places = np.random.RandomState(settings.seed).choice(len(index), size=size, replace=False)
    shards: list[str] = []
    rows: list[ScoredPair] = []
    for number in np.unique(index.shard_numbers[places]).tolist():
        shard = index.shards[number]
        wanted = np.sort(index.rows[places[index.shard_numbers[places] == number]])
        rows += read_shard_rows(cache.shards.path_of(shard), wanted.tolist())
        shards += [shard.sha256] * len(wanted)
    return shards, rows


def _distances(rows: Sequence[ScoredPair], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """In nats; none from a value that the cache does not know."""
    cached = np.array([[getattr(row, name) for name in VALUE_COLUMNS] for row in rows])
    distances: npt.NDArray[np.float64] = np.abs(values - cached)
    return np.where(np.isnan(cached), 0.0, distances)


def _tokens(row: ScoredPair) -> tuple[int, int, int, int]:
    """How many tokens each of the four values is a sum over."""
    common = min(row.chosen_tokens, row.rejected_tokens)
    return row.chosen_tokens, row.rejected_tokens, common, common

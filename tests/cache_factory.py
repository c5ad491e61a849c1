"""Small caches of random pairs for the tests: no model, made-up values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.pipeline.cache.example_key import example_key, keys_array, prompt_hash_prefix
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.mixture_rows import MixtureRows
from dpo_cache.pipeline.cache.reference_identity import ReferenceIdentity
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.cache.shard_file import ShardReader, read_shard_rows
from dpo_cache.pipeline.data.token_pair import TokenPair


def make_identity(**changes: object) -> ReferenceIdentity:
    """An identity of nothing in particular."""
    fields: dict[str, object] = {
        "weights_sha256": "a" * 64,
        "adapter_sha256": None,
        "config": {"model_type": "llama", "rope_theta": 10000.0},
        "weight_dtype": "float32",
        "compute_dtype": "float32",
        "attention": "sdpa",
        "scoring_version": 1,
    }
    return ReferenceIdentity(**(fields | changes))  # type: ignore[arg-type]


def make_cache(path: Path, **changes: object) -> ReferenceCache:
    """An empty cache."""
    return ReferenceCache.create(
        path,
        CacheDescription(identity=make_identity(**changes), recorded={"model": "made up"}, vocabulary_sha256="b" * 64),
    )


def make_pair(random: np.random.RandomState, *, masked: bool = False, prompt: Sequence[int] | None = None) -> TokenPair:
    """A pair of random ids; ``masked`` scores some of its tokens only."""
    lengths = random.randint(1, 12, size=3)
    ids = [random.randint(0, 1000, size=length).astype(np.int32) for length in lengths]
    if prompt is not None:
        ids[0] = np.asarray(prompt, dtype=np.int32)
    mask = None
    if masked:
        mask = random.rand(sum(len(part) for part in ids)) < 0.5
        mask[0] = False
        mask[len(ids[0])] = mask[-1] = True
    return TokenPair(prompt_ids=ids[0], chosen_ids=ids[1], rejected_ids=ids[2], scored_mask=mask)


def make_row(
    pair: TokenPair, random: np.random.RandomState, *, token_logps: bool = False, **changes: object
) -> ScoredPair:
    """A pair with made-up values, on request with those of each token, which then add up to the others."""
    fields: dict[str, object] = {
        "key": example_key(pair),
        "pair": pair,
        "ref_chosen_logps": -float(random.rand()) - 0.5,
        "ref_rejected_logps": -float(random.rand()) - 0.5,
        "ref_chosen_common_logps": -float(random.rand()),
        "ref_rejected_common_logps": 0.0,
        "chosen_tokens": pair.chosen_tokens,
        "rejected_tokens": pair.rejected_tokens,
    }
    if token_logps:
        common = min(pair.chosen_tokens, pair.rejected_tokens)
        for side, tokens in (("chosen", pair.chosen_tokens), ("rejected", pair.rejected_tokens)):
            of_each = -random.rand(tokens).astype(np.float32) - np.float32(0.1)
            fields[f"{side}_token_logps"] = of_each
            fields[f"ref_{side}_logps"] = float(of_each.sum(dtype=np.float64))
            fields[f"ref_{side}_common_logps"] = float(of_each[:common].sum(dtype=np.float64))
    return ScoredPair(**(fields | changes))  # type: ignore[arg-type]


def make_rows(num_rows: int, *, seed: int = 0, token_logps: bool = False) -> list[ScoredPair]:
    """Distinct rows, a third of them with a mask."""
    random = np.random.RandomState(seed)
    pairs = [make_pair(random, masked=index % 3 == 0) for index in range(num_rows)]
    return [make_row(pair, random, token_logps=token_logps) for pair in pairs]


def mixture_rows(rows: Sequence[ScoredPair], *, source: int = 0) -> MixtureRows:
    """The rows as a mixture is asked for them, one source row each."""
    pairs = [row.pair for row in rows]
    return MixtureRows(
        example_keys=keys_array([row.key for row in rows]),
        prompt_hashes=np.array([prompt_hash_prefix(pair.prompt_ids) for pair in pairs], dtype=np.uint64),
        prompt_lengths=np.array([len(pair.prompt_ids) for pair in pairs], dtype=np.int32),
        chosen_lengths=np.array([len(pair.chosen_ids) for pair in pairs], dtype=np.int32),
        rejected_lengths=np.array([len(pair.rejected_ids) for pair in pairs], dtype=np.int32),
        sources=np.full(len(rows), source, dtype=np.int32),
        source_rows=np.arange(len(rows), dtype=np.int64),
    )


def read_shard(path: Path) -> list[ScoredPair]:
    """All rows of a shard, in order."""
    with ShardReader(path) as shard:
        num_rows = shard.num_rows
    return read_shard_rows(path, range(num_rows))


def fill_cache(cache: ReferenceCache, rows: Sequence[ScoredPair], *, shard_rows: int, name: str = "train") -> Mixture:
    """Write rows as shards of ``shard_rows`` and a mixture of all of them."""
    for start in range(0, len(rows), shard_rows):
        cache.shards.write(rows[start : start + shard_rows])
    return cache.write_mixture(
        name,
        mixture_rows(rows),
        key_index=cache.shards.key_index(),
        tokenization={"tokenizer": "made up"},
        sources=[{"path": "made up"}],
        dropped={"empty-response": 3},
    )

"""A big cache of short pairs through all of stage one but the model, whose values are made up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_factory import make_cache
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.example_key import example_key
from dpo_cache.pipeline.cache.key_index import KeyIndex
from dpo_cache.pipeline.cache.pair_spool import PairSpool
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.data.dataset_source import open_dataset
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.stages.building.build_plan import cut_units
from dpo_cache.stages.building.pair_collection import CollectedPairs
from dpo_cache.stages.building.pair_collector import collect_pairs
from tiny_model import WORDS, tiny_tokenizer

PAIRS, TOKENIZER, CACHE = "pairs.jsonl", "tokenizer", "cache"


def write_pairs(folder: Path, num_pairs: int) -> None:
    """Distinct pairs of a sentence each, as JSON lines, and a tokenizer for them."""
    generator = random.Random(0)
    with (folder / PAIRS).open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in _rows(generator, num_pairs))
    tiny_tokenizer(vocabulary=512).save_pretrained(folder / TOKENIZER)


def collect(folder: Path, *, known: KeyIndex | None, spool: Path) -> CollectedPairs:
    """What a build does before it scores."""
    return collect_pairs(
        [open_dataset(DatasetSpec.parse(str(folder / PAIRS)))],
        TokenizationSettings(tokenizer=str(folder / TOKENIZER), max_seq_length=2048),
        known=known,
        spool=spool,
        max_unusable_share=0.0,
    )


def build(folder: Path) -> ReferenceCache:
    """Build the cache of the folder's pairs."""
    cache = make_cache(folder / CACHE)
    spool_path = folder / "pairs.arrow"
    collected = collect(folder, known=None, spool=spool_path)
    spool = PairSpool(spool_path)
    order, units = cut_units(collected.waiting, num_workers=2)
    indices = collected.waiting.spool_indices[order].tolist()
    for unit in units:
        cache.shards.write([_made_up(pair) for pair in spool.read(indices[unit.start : unit.stop])])
    collected.content.write(cache, "train", key_index=cache.shards.key_index())
    spool_path.unlink()
    return cache


def _rows(generator: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        question, chosen, rejected = (" ".join(generator.choices(WORDS, k=generator.randint(3, 9))) for _ in range(3))
        yield {
            "prompt": [{"role": "user", "content": f"{number} {question}"}],
            "chosen": [{"role": "assistant", "content": f"{chosen} yes"}],
            "rejected": [{"role": "assistant", "content": f"{rejected} no"}],
        }


def _made_up(pair: TokenPair) -> ScoredPair:
    """Values with as many digits as real ones."""
    key = example_key(pair)
    chosen, rejected = (
        -pair_tokens * (1 + digit / 256 + key[2] / 1e6)
        for pair_tokens, digit in zip((pair.chosen_tokens, pair.rejected_tokens), key[:2], strict=True)
    )
    return ScoredPair(
        key=key,
        pair=pair,
        ref_chosen_logps=chosen,
        ref_rejected_logps=rejected,
        ref_chosen_common_logps=chosen * 0.9,
        ref_rejected_common_logps=rejected * 0.9,
        chosen_tokens=pair.chosen_tokens,
        rejected_tokens=pair.rejected_tokens,
    )

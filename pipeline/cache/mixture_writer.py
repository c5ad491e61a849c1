"""Training pairs to a mixture: which shard holds each, the table, then the pointer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .canonical_json import JsonObject
from .example_key import Keys, name_keys
from .key_index import KeyIndex
from .mixture import Mixture, check_name
from .mixture_pointer import write_pointer
from .mixture_rows import MixtureRows
from .mixture_table import training_set_digest, write_table


def write_mixture(
    cache_path: Path,
    name: str,
    rows: MixtureRows,
    *,
    reference_id: str,
    key_index: KeyIndex,
    tokenization: JsonObject,
    sources: list[JsonObject],
    dropped: JsonObject,
) -> Mixture:
    """Write a mixture's table, then its pointer. Rows are put into mixture order here.

    Raises:
        DpoCacheError: The name cannot name a mixture, there are no pairs, or no shard holds some of them (with their
            number and first keys).
    """
    check_name(name)
    if not len(rows):
        raise DpoCacheError(f"mixture {name} would have no pairs")
    rows, repeats = rows.in_mixture_order()
    places = _places(rows.example_keys, key_index, name)
    used, used_numbers = np.unique(key_index.shard_numbers[places], return_inverse=True)
    by_digest = np.argsort([key_index.shards[number].sha256 for number in used.tolist()])
    shards = np.argsort(by_digest)[used_numbers]
    table = write_table(
        cache_path,
        rows,
        repeats=repeats,
        shards=shards.astype(np.int32),
        shard_rows=key_index.rows[places],
        reference_id=reference_id,
    )
    mixture = Mixture(
        name=name,
        digest=training_set_digest(rows.example_keys),
        reference_id=reference_id,
        num_pairs=len(rows),
        num_distinct_pairs=int((repeats == 0).sum()),
        num_ids=rows.num_ids(),
        block_rows=table.block_rows,
        tokenization=tokenization,
        sources=sources,
        dropped=dropped,
        shards=[key_index.shards[number] for number in used[by_digest].tolist()],
        has_token_logps=bool(key_index.has_token_logps[used].all()),
        table=table,
    )
    write_pointer(cache_path, mixture)
    return mixture


def _places(keys: Keys, key_index: KeyIndex, name: str) -> npt.NDArray[np.int64]:
    order = np.argsort(keys, kind="stable")
    places = np.empty(len(keys), dtype=np.int64)
    places[order] = key_index.find(keys[order])  # ascending look-ups are many times quicker
    missing = places < 0
    if missing.any():
        raise DpoCacheError(
            f"{int(missing.sum())} pairs of mixture {name} are in no shard: {name_keys(keys[missing])}",
            next_step="run the same dpo-cache build again; it scores only what is missing",
        )
    return places

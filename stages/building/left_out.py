"""Pairs that are left out of a mixture because the reference gives them no usable log-probability.

Their keys stand beside the dataset they come from, so that the same build again need not score them to know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pipeline.cache.example_key import KEY_BYTES, Keys, keys_array
from ...pipeline.cache.mixture_rows import MixtureRows
from ...pipeline.cache.scored_pair import ScoredPair, unusable_in_words, unusable_reasons, values_of, whole_values
from .row_counts import DROPPED

LEFT_OUT = "left_out"
"""Member of a dataset's record: for each reason the keys of its pairs, in hex."""

KeysByReason = Mapping[str, Keys]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusablePair:
    """A pair whose log-probabilities are refused.

    Attributes:
        key: Its key in hex.
        reason: One of those that :func:`~..pipeline.cache.scored_pair.unusable_reasons` knows.
        chosen: What the reference gives the chosen side, in nats.
        rejected: The same of the rejected side.
    """

    key: str
    reason: str
    chosen: float
    rejected: float


def unusable_pairs(rows: Sequence[ScoredPair]) -> list[UnusablePair]:
    """Those of some rows whose values are refused."""
    reasons = unusable_reasons(values_of(rows))
    return [
        UnusablePair(key=row.key.hex(), reason=reason, chosen=row.ref_chosen_logps, rejected=row.ref_rejected_logps)
        for reason, is_refused in reasons.items()
        for row in (rows[index] for index in np.flatnonzero(is_refused).tolist())
    ]


def keys_by_reason(pairs: Iterable[UnusablePair]) -> dict[str, Keys]:
    """The keys of pairs, by the reason why they are refused."""
    found: defaultdict[str, list[bytes]] = defaultdict(list)
    for pair in pairs:
        found[pair.reason].append(bytes.fromhex(pair.key))
    return {reason: keys_array(keys) for reason, keys in found.items()}


def pairs_in_words(pairs: Sequence[UnusablePair]) -> str:
    """How many pairs are refused for which reason, and the first of them with their values."""
    chosen, rejected = (np.array([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected"))
    keys = keys_array([bytes.fromhex(pair.key) for pair in pairs])
    return unusable_in_words(keys, whole_values(chosen, rejected))


def without_pairs(
    rows: MixtureRows, sources: Sequence[dict[str, Any]], keys: KeysByReason
) -> tuple[MixtureRows, list[dict[str, Any]]]:
    """Rows without the pairs of these keys, and the datasets' records with those keys and counts added.

    Args:
        rows: Training pairs.
        sources: The records of their datasets.
        keys: What is left out, by reason.
    """
    records = [dict(source) for source in sources]
    stays = np.ones(len(rows), dtype=np.bool_)
    for reason, left_out in keys.items():
        goes = np.isin(rows.example_keys, left_out)
        stays &= ~goes
        for number in np.unique(rows.sources[goes]).tolist():
            of_source = goes & (rows.sources == number)
            records[number] = _with_left_out(
                records[number],
                reason,
                np.unique(rows.example_keys[of_source]),
                num_rows=len(np.unique(rows.source_rows[of_source])),
            )
    return rows.take(np.flatnonzero(stays)), records


def recorded_keys(sources: Iterable[dict[str, Any]]) -> dict[str, Keys]:
    """The keys that datasets' records say are left out, by reason; whatever else stands there is none of ours."""
    found: dict[str, set[bytes]] = {}
    for source in sources:
        by_reason = source.get(LEFT_OUT)
        for reason, keys in by_reason.items() if isinstance(by_reason, dict) else ():
            found.setdefault(reason, set()).update(map(_parsed, keys if isinstance(keys, list) else []))
    return {reason: keys_array(sorted(keys - {b""})) for reason, keys in found.items() if keys - {b""}}


def _with_left_out(source: dict[str, Any], reason: str, keys: Keys, *, num_rows: int) -> dict[str, Any]:
    dropped, left_out = dict(source.get(DROPPED) or {}), dict(source.get(LEFT_OUT) or {})
    dropped[reason] = dropped.get(reason, 0) + num_rows
    left_out[reason] = sorted(
        {*left_out.get(reason, []), *(key.ljust(KEY_BYTES, b"\0").hex() for key in keys.tolist())}
    )
    return {**source, DROPPED: dict(sorted(dropped.items())), LEFT_OUT: left_out}


def _parsed(key: object) -> bytes:
    try:
        parsed = bytes.fromhex(str(key))
    except ValueError:
        return b""
    return parsed if len(parsed) == KEY_BYTES else b""

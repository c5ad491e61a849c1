"""What became of the rows of a mixture's datasets: which were taken, how many are not used, how many were cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..console.counted_noun import counted

DROPPED = "dropped"
"""Member of a dataset's record: how many of its rows are not in the mixture, by reason."""
TRUNCATED = "truncated"
"""Member of a dataset's record: how many of its rows were cut, by part, as
:class:`~..pipeline.data.pair_tokenizer.PairTokenizer` counts them.

Absent where none was, and so is a part of which none was. Rows that are left out because of their log-probabilities
are still counted.
"""

WORRYING_SHARE = 0.1
"""A build warns where a larger share of the rows has a cut response."""


def source_in_words(source: Mapping[str, Any]) -> str:
    """Which dataset a mixture records, with the split that tells it from others of its folder, and how many rows.

    Args:
        source: A dataset's record. A cache of other people may lack any part of it.
    """
    parts = [f",{name}={source[name]}" for name in ("config", "split") if source.get(name) not in (None, "", "train")]
    return f"{source.get('path')}{''.join(parts)} ({source.get('picked_rows', 'all')} rows)"


def dropped_rows(sources: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many rows of all datasets together are not in the mixture, by reason."""
    return _total(sources, DROPPED)


def dropped_in_words(dropped: Mapping[str, int]) -> str:
    """How many rows are not used for which reason; empty where all are."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


def truncated_rows(sources: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many rows of all datasets together were cut, by part; empty where none was, or an old cache does not say."""
    return _total(sources, TRUNCATED)


def truncated_in_words(truncated: Mapping[str, int], *, num_rows: int | None = None) -> str:
    """How many prompts or responses were cut, and in how many rows.

    Args:
        truncated: By part; not empty.
        num_rows: Of how many that make pairs; None where that is not known.
    """
    cut = truncated.get("prompt", 0) + truncated.get("either", 0)
    rows = counted(cut, "row") if num_rows is None else f"{cut:,} of {counted(num_rows, 'row')}"
    if "prompt" in truncated:
        return f"the prompt in {rows}"
    chosen, rejected = (truncated.get(side, 0) for side in ("chosen", "rejected"))
    return f"{chosen:,} chosen and {rejected:,} rejected responses in {rows}"


def truncation_warning(truncated: Mapping[str, int], *, num_rows: int) -> str | None:
    """What to tell people if many responses lost their end; else None.

    Args:
        truncated: Rows that were cut, by part.
        num_rows: Rows that make pairs.
    """
    cut = truncated.get("either", 0)
    if cut <= WORRYING_SHARE * num_rows:
        return None
    return (
        f"{cut:,} of {counted(num_rows, 'row')} have a response that was cut and so ends without its eos; "
        "raise --max-seq-length, or drop these rows with --truncation drop"
    )


def _total(sources: Iterable[dict[str, Any]], member: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for source in sources:
        for name, count in (source.get(member) or {}).items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))

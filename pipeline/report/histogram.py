"""How values are distributed, counted into bins of one width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BINS = 40
TAIL = 0.002
"""Share of the values at either end that goes into the outermost bins, so that no outlier squeezes the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts of several groups of values in the same bins.

    Attributes:
        title: What is counted.
        unit: Of the values.
        edges: Of the bins, one more than there are bins.
        counts: By group; the outermost bins hold what lies beyond them too.
    """

    title: str
    unit: str
    edges: list[float]
    counts: dict[str, list[int]]


def histogram(title: str, unit: str, groups: Mapping[str, npt.NDArray[np.float64]]) -> Histogram:
    """Count each group; whole numbers get bins of a whole width."""
    values = np.concatenate(list(groups.values()))
    low, high = np.quantile(values, [TAIL, 1 - TAIL], method="nearest")
    if bool((values == np.round(values)).all()):
        width = max(1.0, float(np.ceil((high - low + 1) / NUM_BINS)))
        edges = np.arange(low, high + width + 0.5, width)
    else:
        spread = high - low or 1.0
        edges = np.linspace(low, low + spread, NUM_BINS + 1)
    inside = {name: np.clip(group, edges[0], np.nextafter(edges[-1], edges[0])) for name, group in groups.items()}
    return Histogram(
        title=title,
        unit=unit,
        edges=edges.tolist(),
        counts={name: np.histogram(group, edges)[0].tolist() for name, group in inside.items()},
    )

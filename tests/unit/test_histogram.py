from __future__ import annotations

import numpy as np
import numpy.typing as npt
from dpo_cache.pipeline.report.histogram import NUM_BINS, histogram
from hypothesis import given
from hypothesis import strategies as st


def numbers(values: list[float]) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


@given(
    chosen=st.lists(st.one_of(st.integers(1, 5000), st.floats(-1e3, 0)), min_size=1, max_size=100),
    rejected=st.lists(st.integers(1, 5000), min_size=1, max_size=100),
)
def test_every_value_is_counted_once(chosen: list[float], rejected: list[float]) -> None:
    found = histogram("t", "u", {"chosen": numbers(chosen), "rejected": numbers(rejected)})
    assert {name: sum(counts) for name, counts in found.counts.items()} == {
        "chosen": len(chosen),
        "rejected": len(rejected),
    }
    assert all(len(counts) == len(found.edges) - 1 <= NUM_BINS for counts in found.counts.values())
    assert (np.diff(found.edges) > 0).all()


def test_lengths_get_bins_of_whole_numbers() -> None:
    found = histogram("t", "tokens", {"prompt": numbers([3, 3, 5, 90])})
    assert all(edge == int(edge) for edge in found.edges)
    assert found.counts["prompt"][0] >= 2


def test_an_outlier_does_not_squeeze_the_rest() -> None:
    values = numbers([*np.linspace(-2, -1, 5000).tolist(), -1e6])
    found = histogram("t", "nats", {"all": values})
    assert found.edges[0] > -3
    assert found.counts["all"][0] >= 1

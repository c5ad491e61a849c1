"""Items of given lengths into bins: into as few as it takes, or evenly into a given number."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, no bin above ``capacity``: longest item first, each into the fullest bin with room.

    Best-fit decreasing. An item longer than ``capacity`` gets a bin of its own.
    """
    bins: list[list[int]] = []
    fullest_first: list[tuple[int, int]] = []  # room and number of every bin
    for item in _longest_first(lengths):
        place = bisect_left(fullest_first, (lengths[item], 0))
        if place < len(fullest_first):
            room, number = fullest_first.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        insort(fullest_first, (room - lengths[item], number))
    return bins


def even_bins(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """``num_bins`` bins of item indices, alike in length: longest item first, each into the emptiest bin so far.

    The rule of the longest processing time first.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for item in _longest_first(lengths):
        load, emptiest = loads[0]
        bins[emptiest].append(item)
        heapq.heapreplace(loads, (load + lengths[item], emptiest))
    return bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])

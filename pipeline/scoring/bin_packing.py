"""Items of given lengths into as few bins as it takes."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, no bin above ``capacity``: longest item first, each into the fullest bin with room.

    Best-fit decreasing. An item longer than ``capacity`` gets a bin of its own.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [number for number, left in enumerate(room) if left >= lengths[item]]
        if fitting:
            fullest = min(fitting, key=room.__getitem__)
            bins[fullest].append(item)
            room[fullest] -= lengths[item]
        else:
            bins.append([item])
            room.append(capacity - lengths[item])
    return bins

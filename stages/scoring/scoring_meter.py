"""How well a build uses its devices, counted where all its processes see it."""

from __future__ import annotations

import torch

from ...pipeline.scoring.device_limits import peak_flops_per_second, peak_memory_bytes
from ...pipeline.scoring.flops import ModelCost, forward_flops
from ...pipeline.scoring.scoring_batch import ScoringBatch
from .unit_queue import UnitQueue


class ScoringMeter:
    """What one scoring process adds.

    Args:
        counters: The build's.
        device: Its own.
        cost: Of the reference.
    """

    def __init__(self, counters: UnitQueue, *, device: torch.device, cost: ModelCost) -> None:
        self._counters = counters
        self._device = device
        self._cost = cost
        self._peak_flops = peak_flops_per_second(device)
        self._memory_mib = 0

    def add(self, tensors: ScoringBatch, *, forward_s: float, turn_s: float) -> None:
        """One batch is done.

        Args:
            tensors: The batch.
            forward_s: Time of its forward pass.
            turn_s: Time since the batch before it, waiting for the reader and the writer included.
        """
        self._counters.add("forward_us", int(1e6 * forward_s))
        self._counters.add("turn_us", int(1e6 * turn_s))
        if self._peak_flops is not None:
            done = forward_flops(
                self._cost,
                num_tokens=tensors.num_tokens,
                num_attended=tensors.num_attended,
                num_scored=tensors.num_scored,
            )
            self._counters.add("gigaflops", done // 10**9)
            self._counters.add("possible_gigaflops", int(turn_s * self._peak_flops / 1e9))
        memory_mib = peak_memory_bytes(self._device) >> 20
        if memory_mib > self._memory_mib:  # what is added is the growth, so that the processes' sum is right
            self._counters.add("memory_mib", memory_mib - self._memory_mib)
            self._memory_mib = memory_mib


def meter_reading(counters: UnitQueue) -> dict[str, str]:
    """For whoever watches: memory of all scoring processes together, and MFU where a peak is known."""
    reading = {"GiB": f"{counters.add('memory_mib', 0) / 1024:.1f}"}
    possible = counters.add("possible_gigaflops", 0)
    if possible:
        reading["mfu"] = f"{counters.add('gigaflops', 0) / possible:.0%}"
    return reading

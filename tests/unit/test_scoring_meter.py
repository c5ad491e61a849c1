from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_cache.pipeline.scoring.flops import ModelCost, forward_flops
from dpo_cache.stages.scoring import scoring_meter
from dpo_cache.stages.scoring.scoring_meter import ScoringMeter, meter_reading

COST = ModelCost(backbone_weights=10**9, head_weights=10**6, attention_width=4096)
BATCH: Any = SimpleNamespace(num_tokens=1000, num_attended=10_000, num_scored=500)


class Counters:
    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, amount: int) -> int:
        self.values[name] += amount
        return self.values[name]


def meter(counters: Any) -> ScoringMeter:
    return ScoringMeter(counters, device=torch.device("cpu"), cost=COST)


def test_mfu_is_what_was_done_over_what_all_devices_could_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_meter, "peak_flops_per_second", lambda device: 1e13)
    counters: Any = Counters()
    done = forward_flops(COST, num_tokens=1000, num_attended=10_000, num_scored=500)
    for seconds in (0.5, 1.5):  # two devices, one waits
        meter(counters).add(BATCH, forward_s=0.4, turn_s=seconds)
    assert meter_reading(counters)["mfu"] == f"{2 * done / (2.0 * 1e13):.0%}"


def test_memory_is_that_of_all_processes_at_their_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: Any = Counters()
    held = iter([1 << 30, 1 << 30, 3 << 29, 1 << 29])
    monkeypatch.setattr(scoring_meter, "peak_memory_bytes", lambda device: next(held))
    one, other = meter(counters), meter(counters)
    for process in (one, other, one, other):
        process.add(BATCH, forward_s=0.1, turn_s=0.1)
    assert meter_reading(counters) == {"GiB": "2.5"}  # and no MFU where no peak is known
    assert counters.values["turn_us"] == 400_000

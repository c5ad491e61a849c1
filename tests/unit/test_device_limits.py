"""Peaks behind the performance fields."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.pipeline.scoring.device_limits import peak_flops_per_second, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA Nonesuch", None),
    ],
)
def test_peaks_are_known_by_name_or_not_at_all(
    name: str, teraflops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if teraflops is None else teraflops * 1e12
    assert peak_flops_per_second(torch.device("cuda")) == expected
    assert peak_flops_per_second(torch.device("cpu")) is None


def test_peak_memory_of_a_cpu_process_is_in_bytes() -> None:
    assert 2**24 < peak_memory_bytes(torch.device("cpu")) < 2**40

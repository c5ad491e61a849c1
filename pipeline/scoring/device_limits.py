"""What a device could do at most, and what of its memory was used."""

from __future__ import annotations

import resource

import torch

PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "H20": 148,
    "B200": 2250,
    "GB200": 2500,
    "MI300X": 1307,
    "L40S": 362,
    "A6000": 155,
}
"""Dense bf16 peaks from the makers' data sheets; of names that contain one another, the longest counts."""


def peak_flops_per_second(device: torch.device) -> float | None:
    """What the device's data sheet promises in bf16, None where we know no figure."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if known in name:
            return PEAK_TFLOPS[known] * 1e12
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process ever held: allocated on its GPU, or resident where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

"""A micro-step touches the device's tensors alone and waits for none of them; no GPU is needed to see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PRETENDED_GPU = Path(__file__).parents[1] / "pretended_gpu.py"


def micro_step(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PRETENDED_GPU), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("architecture", "layout", "kernel", "loss"),
    [
        ("llama", "prefix-shared", "sdpa", "dpo_norm"),
        ("gemma2", "prefix-shared", "eager", "ipo,wpo=0.5,aot"),
        ("mixtral", "padded", "sdpa", "simpo"),
    ],
)
def test_a_micro_step_mixes_no_devices_and_waits_for_no_value(
    architecture: str, layout: str, kernel: str, loss: str
) -> None:
    done = micro_step(architecture, layout, kernel, loss)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_tensor_on_the_wrong_device_would_be_seen() -> None:
    done = micro_step("llama", "padded", "sdpa", "dpo", "cpu")
    assert done.returncode == 1
    assert "found at least two devices, cpu and gpu:0" in done.stderr

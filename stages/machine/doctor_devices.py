"""GPUs, what lets them talk to each other, and the kernels that run on them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

from .finding import Finding, Level

_found = partial(Finding, "devices")
DRIVER = Path("/proc/driver/nvidia/version")
"""There where the machine has an Nvidia GPU with a driver, whatever torch makes of it."""
OCCUPIED_SHARE = 0.1
GIB = 2**30


def examine_devices() -> Iterator[Finding]:
    """What torch sees; nothing where torch itself cannot be imported, which is told elsewhere."""
    try:
        import torch
    except Exception:
        return
    if torch.cuda.is_available():
        yield from _gpus()
    else:
        yield _no_gpu()
    yield _collectives()
    yield from _attention_kernels()
    yield _liger()
    yield _compiler()


def _no_gpu() -> Finding:
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not DRIVER.exists():
        return _found("GPUs", "none: both commands run on the CPU, for trying out and small models", Level.NOTE)
    if hidden is not None and hidden.strip() in ("", "-1"):
        return _found("GPUs", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", Level.WARNING, "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return _found(
            "GPUs",
            f"there, but torch {torch.__version__} is a build without CUDA",
            Level.WARNING,
            "install the build for your CUDA version: https://pytorch.org/get-started/locally",
        )
    return _found(
        "GPUs",
        f"there, but torch cannot use them: it is built for CUDA {torch.version.cuda}",
        Level.WARNING,
        "nvidia-smi says which CUDA version the driver takes: update the driver, or install an older build of torch",
    )


def _gpus() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        value = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if free < (1 - OCCUPIED_SHARE) * total:
            yield _found(
                f"GPU {index}",
                value,
                Level.WARNING,
                "something else uses it: nvidia-smi names the processes, CUDA_VISIBLE_DEVICES chooses other GPUs",
            )
        else:
            yield _found(f"GPU {index}", value)
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield _found("bfloat16", "these GPUs cannot compute in it", Level.WARNING, "build with --dtype float32")


def _collectives() -> Finding:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        if dist.is_available() and dist.is_gloo_available():
            return _found("collectives", "gloo; NCCL is for GPUs")
        return _found("collectives", "this torch has no gloo", Level.FATAL, "install an official build of torch")
    if dist.is_nccl_available():
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        return _found("collectives", "NCCL " + ".".join(map(str, version)))
    if torch.cuda.device_count() == 1:
        return _found("collectives", "no NCCL", Level.FATAL, "install an official CUDA build of torch")
    return _found(
        "collectives", "no NCCL: these GPUs cannot train together", Level.FATAL, "install an official build of torch"
    )


def _attention_kernels() -> Iterator[Finding]:
    import torch

    from ...pipeline.scoring.attention_choice import FLEX_HEAD_SIZES, gpu_surely_runs_flex

    on_gpu = torch.cuda.is_available()
    flex_is_default = on_gpu and gpu_surely_runs_flex(torch.device("cuda"))
    yield _found("sdpa", "there" if flex_is_default else "there, the default")
    if on_gpu and importlib.util.find_spec("triton") is None:
        yield _found("flex_attention", "needs triton", Level.WARNING, "pip install triton")
    elif on_gpu:
        heads = f"; the default for heads of {', '.join(map(str, FLEX_HEAD_SIZES))}" if flex_is_default else ""
        yield _found("flex_attention", f"there, triton {metadata.version('triton')}{heads}")
    else:
        yield _found("flex_attention", "on a GPU only: it has no backward pass on a CPU", Level.NOTE)
    if importlib.util.find_spec("flash_attn") is None:
        yield _found(
            "flash_attention_2", "not installed; only --attn-implementation flash_attention_2 asks for it", Level.NOTE
        )
    elif not on_gpu:
        yield _found("flash_attention_2", "on a GPU only", Level.NOTE)
    else:
        yield _found("flash_attention_2", f"flash-attn {metadata.version('flash-attn')}")


def _liger() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return _found("Liger's kernels", "on a GPU only", Level.NOTE)
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as fault:
        return _found(
            "Liger's kernels",
            f"cannot be imported: {fault}",
            Level.WARNING,
            "pip install --force-reinstall liger-kernel, or leave --use-liger-kernel out",
        )
    return _found("Liger's kernels", f"for {len(MODEL_TYPE_TO_APPLY_LIGER_FN)} architectures")


def _compiler() -> Finding:
    import torch

    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler:
        return _found("C compiler", compiler)
    if not torch.cuda.is_available():
        return _found("C compiler", "none; nothing on a CPU needs one")
    return _found(
        "C compiler",
        "none: triton needs one for flex_attention and Liger's kernels",
        Level.WARNING,
        "install gcc (Debian, Ubuntu: apt install build-essential), or keep to sdpa without --use-liger-kernel",
    )

"""What safetensors files say of their tensors: read back after writing, and asked for a checkpoint's dtype."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import DpoCacheError

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorHeader(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def header_of(tensor: Tensor) -> TensorHeader:
    """The header that a tensor has once it is written."""
    return TensorHeader(dtype=_SAFETENSORS_DTYPES[tensor.dtype], shape=tuple(tensor.shape))


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Name, dtype and shape of every tensor in a folder's safetensors files; no data is read."""
    headers: dict[str, TensorHeader] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                part = tensors.get_slice(name)
                headers[name] = TensorHeader(dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    return headers


def differences(found: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """Which tensors are missing, unexpected or described otherwise, in words, in the order of their names."""
    return [
        f"{name}: {found.get(name)} instead of {expected.get(name)}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]


def check_headers(folder: Path, expected: Mapping[str, TensorHeader]) -> None:
    """Read back what was written: every name, shape and dtype.

    Raises:
        DpoCacheError: Naming the first tensors that are missing, unexpected or different.
    """
    wrong = differences(read_headers(folder), expected)
    if wrong:
        raise DpoCacheError(
            f"the model written to {folder} is not the one trained; {len(wrong)} tensors differ: "
            + "; ".join(wrong[:5]),
            next_step="run again with --resume: the last checkpoint is complete",
        )


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype that the trained model is written in: that of most of a checkpoint's numbers, but for F64.

    The optimizer keeps float32 weights, so that a model written in float64 would only be larger.

    Raises:
        DpoCacheError: There is no safetensors file, or most of the numbers are quantized weights (FP8, integers).
    """
    numbers: Counter[str] = Counter()
    for header in read_headers(folder).values():
        numbers[header.dtype] += math.prod(header.shape)
    if not numbers:
        raise DpoCacheError(f"{folder} holds no safetensors file")
    name = numbers.most_common(1)[0][0]
    trainable = {known: dtype for dtype, known in _SAFETENSORS_DTYPES.items() if dtype.is_floating_point}
    if name not in trainable:
        raise DpoCacheError(
            f"most weights of {folder} are {name}, a dtype of quantized weights, which cannot be trained",
            expected="a checkpoint in BF16, F16 or F32",
            next_step="build a cache with the model that it was made from, or convert it to one of those first",
        )
    return torch.float32 if name == "F64" else trainable[name]

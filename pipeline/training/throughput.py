"""How fast a run is, against what its devices could do.

Model FLOPs, the convention of ``perf/mfu``: forward and backward cost 6 FLOPs a parameter and token, the backbone's
parameters with every token computed (a shared prompt once, padding never), the vocabulary head's with every scored
token only, because no other token passes through it. Attention's own products and recomputing activations are left
out, so the figure is a lower bound.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch
from torch import nn

PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "L40S": 362,
    "A6000": 155,
}
"""Dense bf16 peaks from the makers' data sheets; longer names first where one contains another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of training one token.

    Attributes:
        backbone_parameters: Parameters every token passes through: all but embedding and head.
        head_parameters: Parameters of the vocabulary projection, tied or not.
    """

    backbone_parameters: int
    head_parameters: int

    def training(self, *, tokens: float, scored_tokens: float) -> float:
        """FLOPs of forward and backward."""
        return 6 * (self.backbone_parameters * tokens + self.head_parameters * scored_tokens)


def model_flops(causal_lm: nn.Module) -> ModelFlops:
    """Count the parameters of a causal language model of transformers, partitioned or not."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()  # type: ignore[operator]
    aside = {id(parameter) for module in (embedding, head) for parameter in module.parameters()}
    backbone = sum(_numel(parameter) for parameter in causal_lm.parameters() if id(parameter) not in aside)
    return ModelFlops(
        backbone_parameters=backbone,
        head_parameters=sum(_numel(parameter) for parameter in head.parameters()),
    )


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


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))

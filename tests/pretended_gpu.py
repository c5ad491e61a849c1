"""A micro-step on a GPU that is not there: its tensors have shapes and a device, and no values.

An operation raises if it mixes tensors of the device with those of the host, or asks for a value, which on a GPU would
wait for it. Run in a process of its own, because torch keeps the pretended device for good:

    python tests/pretended_gpu.py ARCHITECTURE LAYOUT KERNEL LOSS [DEVICE_OF_METRICS]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.eval_margins import EvalMargins
from dpo_cache.pipeline.training.metrics import PairMetrics
from dpo_cache.pipeline.training.micro_batch import MicroBatch, ScoredMicroBatch, collate
from dpo_cache.pipeline.training.objective import Objective, resolve_objective
from dpo_cache.pipeline.training.pair_terms import SortedPartners
from dpo_cache.pipeline.training.preference_loss import preference_loss
from dpo_cache.pipeline.training.step_zero import StepZeroProof
from tiny_model_factory import tiny_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from training_factory import random_pairs

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu", 0)


def main(architecture: str, layout: str, kernel: str, loss: str, device_of_metrics: str = str(GPU)) -> None:
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == GPU.type)  # type: ignore[assignment]
    torch.Tensor.new_tensor = _new_tensor  # type: ignore[assignment, method-assign]  # it fills from the host
    for num_pairs in (5, 0):
        micro_batch = collate(random_pairs(num_pairs), Layout(layout))
        model = tiny_model(architecture, attention=kernel).bfloat16()
        with FakeTensorMode() as pretending:
            _move(model, pretending)
            run_micro_step(
                PairScorer(model, load_balancing=architecture == "mixtral"),
                moved(micro_batch, pretending),
                resolve_objective(loss),
                torch.device(device_of_metrics),
            )


def run_micro_step(scorer: PairScorer, micro_batch: MicroBatch, objective: Objective, device: torch.device) -> None:
    """Forward and backward pass, and all that is added up of them."""
    policy = scorer(micro_batch.batch)
    some_B = micro_batch.reference.chosen_logps_B
    partners = SortedPartners(reference_margin_B=some_B, rejected_B=some_B, chosen_B=some_B)
    outcomes = preference_loss(objective, policy, micro_batch.reference, partners)
    loss = outcomes.objective_B.sum()
    torch.autograd.backward(loss if policy.aux_loss is None else loss + policy.aux_loss)
    for name, parameter in scorer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == GPU, name
    detached: Any = (None if value is None else value.detach() for value in policy)
    scored = ScoredMicroBatch(micro_batch=micro_batch, policy=type(policy)(*detached), outcomes=outcomes.detached())
    PairMetrics(objective, device=device, tie_margin=0.1).add(scored)
    StepZeroProof(objective, dtype="bfloat16", device=device).add(scored)
    EvalMargins(9, device=device).add(np.arange(micro_batch.num_pairs), scored)


def moved(micro_batch: MicroBatch, pretending: FakeTensorMode) -> MicroBatch:
    """The micro-batch without values, moved as training moves it."""
    batch, reference = micro_batch.batch, micro_batch.reference
    pretended = replace(
        micro_batch,
        batch=batch._with_tensors(pretending.from_tensor),
        reference=reference._with_columns(pretending.from_tensor),
    )
    return pretended.to(GPU, non_blocking=True)


def _move(model: nn.Module, pretending: FakeTensorMode) -> None:
    """In place of ``model.to``, which cannot exchange a parameter for one without values."""
    moved_parameters: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in moved_parameters:
                moved_parameters[parameter] = nn.Parameter(pretending.from_tensor(parameter).detach().to(GPU))
            module._parameters[name] = moved_parameters[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = pretending.from_tensor(buffer).to(GPU)


def _new_tensor(like: Tensor, data: Any) -> Tensor:
    return torch.empty(np.shape(data), dtype=like.dtype, device=like.device)


if __name__ == "__main__":
    main(*sys.argv[1:])

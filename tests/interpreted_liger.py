"""Liger's layers on the CPU: Triton interprets their kernels, one program of a grid after another, in numpy.

Prints, for each case, the kernels and the largest differences from transformers' own layers as a line of JSON. All is
in float32: the interpreter takes the bits of a bfloat16 for a whole number. Run in a process of its own, because Triton
reads its variable as it is imported, and Liger changes the modules of transformers for good:

    TRITON_INTERPRET=1 python tests/interpreted_liger.py CASE…
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from dpo_cache.pipeline.training.activation_checkpointing import recompute_activations
from dpo_cache.pipeline.training.liger_layers import use_liger_layers
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora
from tiny_model_factory import tiny_model, token_ids, weighted_loss
from torch import Tensor
from triton.language.extra import libdevice
from triton.runtime import interpreter

ADAPTER = LoraSettings(rank=2, alpha=4, target_modules=("q_proj", "down_proj"), seed=0)


def main(cases: list[str]) -> None:
    """Measure cases, each ``ARCHITECTURE[:adapted]``: with an adapter, and activations that are recomputed."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    teach_the_interpreter()
    importlib.import_module("liger_kernel.transformers")  # now: what it imports would look for the GPU pretended below
    one_layer: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    models = {case: tiny_model(case.partition(":")[0], attention="eager", **one_layer) for case in cases}
    # All of these first: Liger puts its rotary embedding into the module, for models made before as well.
    plain = {case: results(deepcopy(model), case) for case, model in models.items()}
    for case, model in models.items():
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            use_liger_layers(model)
        with launched_kernels() as kernels:
            fused = results(model, case)
        assert fused.keys() == plain[case].keys()
        print(json.dumps({"kernels": sorted(kernels), "differences": differences(fused, plain[case])}))


def teach_the_interpreter() -> None:
    """Two things it lacks: numbers as arguments that are tensors, and the functions of CUDA's own library."""
    implicit_cvt = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if type(argument) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return implicit_cvt(argument)

    interpreter._implicit_cvt = with_floats
    libdevice.rsqrt, libdevice.tanh = rsqrt, tanh


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * x) - 1


@contextmanager
def launched_kernels() -> Iterator[set[str]]:
    """The names of all kernels that are run meanwhile."""
    names: set[str] = set()
    run = interpreter.GridExecutor.__call__

    def noted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(executor.fn.__name__)
        return run(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", noted):
        yield names


def results(model: Any, case: str) -> dict[str, Tensor]:
    """The values of two pairs, whose second response goes back to the positions of the first, and all gradients."""
    if case.endswith(":adapted"):
        model = add_lora(model, ADAPTER)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, when nothing reaches the other matrix
                torch.nn.init.normal_(parameter, std=0.1)
        recompute_activations(model.train())
    logps = PairScorer(model)(scoring_batch(pairs(), Layout.PREFIX_SHARED))
    torch.autograd.backward(weighted_loss(list(logps.chosen_logps_B), list(logps.rejected_logps_B)))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"values": torch.cat([logps.chosen_logps_B, logps.rejected_logps_B]).detach(), **gradients}


def pairs() -> list[TokenPair]:
    random = np.random.RandomState(0)

    def pair(prompt: int, chosen: int, rejected: int) -> TokenPair:
        return TokenPair(
            prompt_ids=token_ids(random, prompt),
            chosen_ids=token_ids(random, chosen),
            rejected_ids=token_ids(random, rejected),
        )

    return [pair(3, 2, 3), pair(2, 1, 2)]


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, as a share of its largest number."""
    return {
        name: float((ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3))
        for name, tensor in theirs.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])

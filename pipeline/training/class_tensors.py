"""The tensors of a model as its class and config define them: what a trained model is compared with before it is saved.

A file may well hold what it was meant to hold and still be no such model, with an adapter's wrapper in its names.
``from_pretrained`` would fill every name that it does not find with random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import DpoCacheError
from .tensor_headers import differences


def class_tensors(causal_lm: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers without data, each under its first name; quick, however large the model is.

    Args:
        causal_lm: A model of transformers; only its class and config are looked at.
    """
    with torch.device("meta"):  # no kernel is run, so that none has to be installed
        empty = type(causal_lm)._from_config(copy.deepcopy(causal_lm.config), attn_implementation="eager")
    first_names: dict[int, str] = {}
    for name, tensor in empty.state_dict(keep_vars=True).items():
        first_names.setdefault(id(tensor), name)  # a tied weight is one tensor under two names
    tensors = empty.state_dict()
    return {name: tensors[name] for name in first_names.values()}


def check_class_tensors(causal_lm: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that tensors are those of the model's class, no more and no fewer.

    Args:
        causal_lm: A model of transformers, with an adapter or without.
        tensors: What is to be saved of it, under the names that the class uses.

    Raises:
        DpoCacheError: Naming the first tensors that are missing, unexpected or of another shape.
    """
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in named.items()} for named in (tensors, class_tensors(causal_lm))
    )
    wrong = differences(found, expected)
    if wrong:
        raise DpoCacheError(
            f"the trained weights are not those of a {type(causal_lm).__name__}; {len(wrong)} differ in name or shape: "
            + "; ".join(wrong[:5]),
            expected="exactly the weights of the base model",
            next_step="report this with the command; the last checkpoint is complete, and --resume continues from it",
        )

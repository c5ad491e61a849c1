"""What is saved is compared with what the class of the model needs, not only with itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.class_tensors import check_class_tensors, class_tensors
from tiny_model_factory import CONFIGS, tiny_model
from torch import Tensor


def _saved(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers of a checkpoint."""
    parameters = dict(model.named_parameters())
    everything = dict(model.named_parameters(remove_duplicate=False))
    return parameters | {name: tensor for name, tensor in model.state_dict().items() if name not in everything}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_has_the_tensors_of_its_class_and_they_take_no_memory(name: str) -> None:
    model = tiny_model(name)
    check_class_tensors(model, _saved(model))
    assert {tensor.device.type for tensor in class_tensors(model).values()} == {"meta"}


def test_a_name_more_a_name_fewer_and_another_shape_are_errors() -> None:
    model = tiny_model("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    saved = _saved(model)
    wrapped = {key.replace("experts.", "experts.base_layer."): tensor for key, tensor in saved.items()}
    with pytest.raises(DpoCacheError, match="not those of a MixtralForCausalLM; 8 differ in name or shape"):
        check_class_tensors(model, wrapped)
    with pytest.raises(DpoCacheError, match=rf"{name}: None instead of \(4, 96, 32\)"):
        check_class_tensors(model, {key: tensor for key, tensor in saved.items() if key != name})
    with pytest.raises(DpoCacheError, match=rf"{name}: \(4, 96\) instead of \(4, 96, 32\)"):
        check_class_tensors(model, saved | {name: torch.empty(4, 96)})

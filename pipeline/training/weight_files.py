"""The weights of a model as safetensors files of bounded size, one of which is in host memory at a time.

What goes into which file is planned before any weight is there: names, shapes and dtypes say it all. Every rank makes
the same plan, so all of them know which weight is gathered next, and when a file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ..cache.weights_digest import MODEL_INDEX
from ..scoring.model_loading import find_causal_lm
from .class_tensors import check_class_tensors
from .host_memory import low_mmap_threshold, return_freed_memory
from .lora_adapter import gathered, lora_change, merged_parameters, name_without_adapter
from .tensor_headers import TensorHeader, header_of

_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""Start of a weight's name, up to the number of its layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A tensor of the model that is saved.

    Attributes:
        made_of: The parameters it is computed from, its own first; or a buffer.
        layer: The layer of peft whose change is added; None where there is none.
        shell: Its shape and dtype in the file, without data.
    """

    made_of: list[Any]
    layer: Any
    shell: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Weights that are converted together to what the files hold; mostly a single one.

    Attributes:
        names: Their names in the model.
        completes: The files that can be written once these weights are there.
    """

    names: list[str]
    completes: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPlan:
    """Which weights go into which file.

    Attributes:
        groups: All weights, in the order in which they are gathered.
        file_of: The file of each tensor, under the name it has there.
        headers: What the files must say of each tensor.
        index: Content of the index; None where one file holds all.
    """

    groups: list[Group]
    file_of: dict[str, str]
    headers: dict[str, TensorHeader]
    index: dict[str, Any] | None


def write_weights(
    model: nn.Module,
    folder: Path | None,
    *,
    dtype: torch.dtype,
    max_file_size: int | str,
    master_of: Callable[[nn.Parameter], Tensor] | None,
    wait: Callable[[], None],
) -> dict[str, TensorHeader]:
    """Write a model's weights, an adapter on it added to them; collective if the model is partitioned.

    The rank that writes holds one file and one weight in host memory, the others one weight, and while a partitioned
    weight is gathered, each rank holds it twice. Where the files of an architecture join weights that the model keeps
    apart, it is a layer instead of a weight.

    Args:
        model: The policy, or a model with an adapter on it.
        folder: Where to; None on ranks that only take part in gathering.
        dtype: What the weights are brought to.
        max_file_size: In bytes, or as text such as ``5GB``. A single tensor may be larger.
        master_of: Gives the more precise weight behind a trained parameter; None to take the parameters themselves.
        wait: Called by all ranks before the first weight is gathered and after each file, so that no rank waits for a
            slow disk, or for a rank that failed to write, inside a collective of the training.

    Returns:
        What the headers of the files must say.

    Raises:
        DpoCacheError: As :func:`saved_weights`, on all ranks alike.
    """
    weights = saved_weights(model, dtype)
    plan = plan_files(find_causal_lm(model), weights, max_file_size)
    wait()
    begun: dict[str, dict[str, Tensor]] = {file: {} for file in plan.file_of.values()}
    with low_mmap_threshold():  # gathering allocates whole weights, whose holes a heap would keep
        for group in plan.groups:
            members = {name: weights[name] for name in group.names}
            for name, tensor in _gather(model, members, keep=folder is not None, master_of=master_of).items():
                begun[plan.file_of[name]][name] = tensor
                del tensor  # or it would stay here while the next weight is gathered
            return_freed_memory()
            for file in group.completes:
                if folder is not None:
                    save_file(begun.pop(file), folder / file, metadata={"format": "pt"})
                wait()
    if folder is not None and plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (folder / MODEL_INDEX).write_text(text, encoding="utf-8")
    return plan.headers


def saved_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Weight]:
    """What belongs to a checkpoint, by its name in a model without an adapter.

    A tied parameter has one name here, the first; loading ties it again.

    Raises:
        DpoCacheError: They are not the weights of the model's class.
    """
    causal_lm = find_causal_lm(model)
    weights = {}
    for name, made_of, layer in merged_parameters(model):
        shape = getattr(made_of[0], "ds_shape", made_of[0].shape)
        weights[name] = Weight(made_of=made_of, layer=layer, shell=torch.empty(shape, dtype=dtype, device="meta"))
    for name, buffer in _saved_buffers(causal_lm):
        weights[name] = Weight(made_of=[buffer], layer=None, shell=buffer.to("meta"))
    check_class_tensors(causal_lm, {name: weight.shell for name, weight in weights.items()})
    ignored = set(causal_lm._keys_to_ignore_on_save or ())
    return {name: weight for name, weight in weights.items() if name not in ignored}


def plan_files(causal_lm: Any, weights: Mapping[str, Weight], max_file_size: int | str) -> WeightPlan:
    """Decide which weights go into which file, under the names that checkpoints of this architecture use."""
    converted = _converted_apart(causal_lm, {name: weight.shell for name, weight in weights.items()})
    # Tensors of their own: the experts that a weight is split into would all count as large as that weight.
    shells = {name: torch.empty_like(shell) for _, become in converted for name, shell in become.items()}
    split = split_torch_state_dict_into_shards(shells, max_shard_size=max_file_size)
    last_group = {split.tensor_to_filename[name]: at for at, (_, become) in enumerate(converted) for name in become}
    groups = [
        Group(names=names, completes=[file for file, last in last_group.items() if last == at])
        for at, (names, _) in enumerate(converted)
    ]
    index = None
    if split.is_sharded:
        numbers = sum(shell.numel() for shell in shells.values())
        index = {
            "metadata": {"total_parameters": numbers, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
    headers = {name: header_of(shell) for name, shell in shells.items()}
    return WeightPlan(groups=groups, file_of=split.tensor_to_filename, headers=headers, index=index)


def _converted_apart(causal_lm: Any, shells: Mapping[str, Tensor]) -> list[tuple[list[str], dict[str, Tensor]]]:
    """The smallest groups of weights that can be converted without the others, and what each of them becomes.

    Some architectures rename, join or split tensors while loading, and undo it while saving; transformers has a
    function that undoes it for all tensors at once. Without data that is quick, so it is tried on each weight alone,
    then on each layer, and the results are compared with what becomes of the whole model.
    """
    whole = revert_weight_conversion(causal_lm, dict(shells))
    for group_of in (str, _layer_of):
        groups: dict[str, list[str]] = {}
        for name in shells:
            groups.setdefault(group_of(name), []).append(name)
        try:
            converted = [
                (names, revert_weight_conversion(causal_lm, {name: shells[name] for name in names}))
                for names in groups.values()
            ]
        except Exception:  # transformers raises whatever a conversion without its other half meets
            continue
        apart = [(name, header_of(shell)) for _, become in converted for name, shell in become.items()]
        if sorted(apart) == sorted((name, header_of(shell)) for name, shell in whole.items()):
            return converted
    return [(list(shells), whole)]


def _layer_of(name: str) -> str:
    start = _LAYER.match(name)
    return name if start is None else start.group()


def _gather(
    model: nn.Module,
    weights: Mapping[str, Weight],
    *,
    keep: bool,
    master_of: Callable[[nn.Parameter], Tensor] | None,
) -> dict[str, Tensor]:
    """What the files hold of some weights, in host memory; nothing on a rank that does not keep it. Collective."""
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        own = weight.made_of[0]
        dtype = weight.shell.dtype
        if master_of is not None and own.requires_grad:
            master = master_of(own).detach()
            if keep:
                state[name] = master.to(device="cpu", dtype=dtype, copy=True)
            continue
        with gathered(weight.made_of):
            if keep:
                whole = own.detach()
                if weight.layer is not None:
                    whole = whole.float() + lora_change(weight.layer)
                state[name] = whole.to(device="cpu", dtype=dtype, copy=True)
    if not keep:
        return {}
    converted = revert_weight_conversion(find_causal_lm(model), state)
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _saved_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint; tables that are computed at loading do not."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield name_without_adapter(f"{module_name}.{name}".removeprefix(".")), buffer

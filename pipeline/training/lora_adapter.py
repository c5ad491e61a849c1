"""LoRA (arXiv 2106.09685): the policy's own weights stay the reference's, small matrices beside them are trained.

``B`` starts at zero, so at the first step the policy is the reference and the proof at step 0 holds for it too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import DpoCacheError
from ..scoring.model_loading import find_causal_lm, find_head

WEIGHTS_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_WRAPPED = "base_layer"
_ADAPTER = "default"
_MERGEABLE = "linear layers and the weights of experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What is trained beside the frozen weights.

    Attributes:
        rank: Inner size r of each pair of matrices.
        alpha: The product ``B A`` is scaled by ``alpha / rank``.
        target_modules: Names of the linear layers that get one; ``all-linear`` for all but the vocabulary head.
        seed: Of the random start of ``A``, which has to be the same on all ranks.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    seed: int


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freeze a model and put a fresh adapter on it; under ZeRO-3 the engine partitions the new weights.

    Raises:
        DpoCacheError: peft is not installed, or no layer of the model has such a name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DpoCacheError(
            "--use-lora needs peft, which is not installed", next_step="pip install 'dpo-cache[lora]'"
        ) from error
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=_devices_of(model)):
            torch.manual_seed(settings.seed)
            # Nothing is cast to float32: the engine keeps float32 masters of whatever is trained. Nor is a quantized
            # model prepared by peft, whose norms and embeddings would then be other ones than the reference's.
            adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise DpoCacheError(
            f"--lora-target-modules {' '.join(targets)} cannot be used with this model: {error}",
            expected=f"names of its linear layers, such as q_proj, or {ALL_LINEAR}",
        ) from error
    _refuse_unscorable(adapted)
    return adapted


def adapter_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The adapter's tensors in host memory, under peft's names, on the ranks that keep them; collective."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to(device="cpu", copy=True)
    if not keep:
        return {}
    named: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return named


def same_adapter(model: nn.Module, state: dict[str, Tensor], base: nn.Module) -> nn.Module:
    """Put the adapter of one model on another of the same layers, such as the one that the first was quantized from.

    Args:
        model: From :func:`add_lora`.
        state: From :func:`adapter_state`.
        base: The other model; becomes part of the one returned.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    peft_model: Any = model
    # In float32 whatever the base is in: nothing of what was trained is rounded away before it is added.
    adapted: nn.Module = get_peft_model(base, copy.deepcopy(peft_model.active_peft_config), autocast_adapter_dtype=True)
    unknown = set_peft_model_state_dict(adapted, state).unexpected_keys
    assert not unknown, unknown
    return adapted


def write_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path, *, base: str, revision: str | None) -> None:
    """Write the adapter's two files.

    Args:
        model: From :func:`add_lora`.
        state: From :func:`adapter_state`.
        folder: Where to; made.
        base: The model it belongs on: a path or a Hub id.
        revision: Its commit on the Hub.
    """
    peft_model: Any = model
    config = copy.deepcopy(peft_model.active_peft_config)
    config.base_model_name_or_path, config.revision = base, revision
    config.inference_mode = True
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter], Any]]:
    """Every parameter of the model that comes out when the adapter is added to its weights.

    Yields:
        The parameter's name in a model without an adapter; the parameters it is made of, to be gathered; and the
        layer of peft whose change is to be added, or None.
    """
    causal_lm = find_causal_lm(model)
    layers = {id(_adapted_parameter(layer)): layer for _, layer in _lora_layers(causal_lm)}
    for name, parameter in causal_lm.named_parameters():
        if ".lora_" in name:
            continue
        layer = layers.get(id(parameter))
        made_of = [parameter]
        if layer is not None:
            made_of += [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
        yield name_without_adapter(name), made_of, layer


def name_without_adapter(name: str) -> str:
    """The name that a tensor has in a model without an adapter.

    Layers of peft wrap those of the model. Two of them are nested around experts, which keep two weights in one module.
    """
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def lora_change(layer: Any) -> Tensor:
    """``alpha / rank * B A`` of a gathered layer, in float32, shaped like its weight.

    For the weights of E experts in one tensor, peft keeps all A and all B in one matrix each: ``A`` is (E R, I) with
    the experts one after another, ``B`` is (O, R E) with the experts of each rank side by side.
    """
    a, b = (matrices[_ADAPTER].weight.detach().float() for matrices in (layer.lora_A, layer.lora_B))
    num_experts = getattr(layer, "num_experts", 1)
    if num_experts > 1:
        a_ERI, b_ORE = a.reshape(num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, num_experts)
        is_output_first = layer._did_swap_in_out_features
        change = torch.einsum("ore,eri->eoi" if is_output_first else "ore,eri->eio", b_ORE, a_ERI)
    else:
        change = (b @ a).T if layer.fan_in_fan_out else b @ a
    return change * float(layer.scaling[_ADAPTER])


def merge_adapter(model: nn.Module) -> nn.Module:
    """Add a loaded adapter to its model's weights; gives the model, whole and to be trained, without the adapter.

    Under ZeRO-3 one layer after another is gathered, so no rank ever holds more than one; collective.

    Raises:
        DpoCacheError: The adapter is no plain LoRA of linear layers and experts.
    """
    peft_model: Any = model
    _refuse_other_than_plain_lora(peft_model)
    for _, made_of, layer in merged_parameters(model):
        if layer is not None:
            with gathered(made_of, changed=True), torch.no_grad():
                weight = made_of[0]
                weight.copy_(weight.float() + lora_change(layer).to(weight.device))
    merged: nn.Module = peft_model.unload()
    return merged.requires_grad_(True)


@contextmanager
def gathered(parameters: list[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """While this is open, parameters that ZeRO-3 has partitioned are whole; collective.

    Args:
        parameters: Of one layer.
        changed: Whether what is written to them meanwhile, on all ranks alike, is to stay.
    """
    is_partitioned = hasattr(parameters[0], "ds_id")
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None, enabled=is_partitioned):
        yield


def refuse_unmergeable(model: nn.Module) -> None:
    """Make sure that an adapter that is yet to be trained can be added to the weights afterwards.

    Args:
        model: From :func:`add_lora`.

    Raises:
        DpoCacheError: A layer is neither linear nor holds experts.
    """
    beyond = _unmergeable_layers(model)
    if beyond:
        raise DpoCacheError(
            f"--merge cannot add an adapter to the weights of {beyond[0]}",
            expected=_MERGEABLE,
            next_step="leave --merge out to save the adapter, or name other layers with --lora-target-modules",
        )


def _refuse_other_than_plain_lora(peft_model: Any) -> None:
    config = peft_model.active_peft_config
    kind = getattr(config.peft_type, "value", config.peft_type)
    names = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication")
    beyond = [f"with {name}" for name in names if getattr(config, name, None)]
    if kind == "LORA":
        beyond += [f"on {layer}" for layer in _unmergeable_layers(peft_model)[:1]]
    if kind != "LORA" or beyond or getattr(config, "bias", "none") != "none":
        raise DpoCacheError(
            " ".join([f"the reference's adapter is a {kind} adapter", *beyond]),
            expected=f"plain LoRA of {_MERGEABLE}, which can be added to the weights here",
            next_step="merge it with peft's merge_and_unload and build a cache with the merged model",
        )
    _refuse_unscorable(peft_model)


def _lora_layers(causal_lm: nn.Module) -> list[tuple[str, Any]]:
    """The layers of peft with their names."""
    return [(name, module) for name, module in causal_lm.named_modules() if getattr(module, "lora_A", None)]


def _adapted_parameter(layer: Any) -> nn.Parameter:
    """The weight of the model that a layer of peft changes."""
    # A layer around a module with several weights names the one; around a linear layer it does not.
    parameter: nn.Parameter = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return parameter


def _unmergeable_layers(model: nn.Module) -> list[str]:
    """Layers whose change :func:`lora_change` does not compute, each with its kind."""
    from peft.tuners.lora import ParamWrapper

    beyond = []
    for name, layer in _lora_layers(find_causal_lm(model)):
        base = layer.get_base_layer()
        is_known = isinstance(layer, ParamWrapper) or isinstance(base, (nn.Linear, Conv1D))
        if layer.lora_variant or not is_known:
            beyond.append(f"{name_without_adapter(name)} ({type(base).__name__})")
    return beyond


def _refuse_unscorable(model: nn.Module) -> None:
    """The head is scored a chunk at a time, and an embedding may be the head."""
    if (
        any(getattr(module, "lora_embedding_A", None) for module in model.modules())
        or type(find_head(model)) is not nn.Linear
    ):
        raise DpoCacheError(
            "--lora-target-modules names the vocabulary head or an embedding, which cannot have an adapter here",
            expected="other layers",
        )


def _devices_of(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)

"""A causal language model from disk, made ready to score: no dropout, no cache, the kernel that was asked for."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from ...errors import DpoCacheError, as_argument, first_line
from .attention_names import GPU_KERNELS
from .quantization import loading_options, prepare_quantized_layers

log = logging.getLogger(__name__)


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model's config; no weights are read.

    Raises:
        DpoCacheError: No readable config there, an adapter instead of a model, a model that reads images, or one whose
            router needs its jitter in evaluation too.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise DpoCacheError(
            f"{path} holds an adapter, not a model",
            expected="a folder with config.json and the base model's weights",
            next_step=f"--model BASE_MODEL --adapter {as_argument(path)}",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DpoCacheError(
            f"no model can be read at {path}: {first_line(error)}",
            expected="a folder with config.json, or the id of a model on the Hub",
        ) from error
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise DpoCacheError(
            f"{path} is a {config.model_type} model, which reads more than text",
            expected="a causal language model of text",
        )
    _refuse_jitter_in_evaluation(path, config)
    return config


def _refuse_jitter_in_evaluation(path: str | Path, config: Any) -> None:
    """Phi's mixture of experts weighs them by its jitter even in evaluation: without it, it is another model."""
    if config.model_type == "phimoe" and config.router_jitter_noise:
        raise DpoCacheError(
            f"{path} is a phimoe model whose router_jitter_noise of {config.router_jitter_noise} decides how experts "
            "are weighted, in evaluation too",
            expected="a router_jitter_noise of 0, because scoring and training run without noise",
            next_step="set it to 0 in config.json, if the model is to be used that way",
        )


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device | str,
    adapter: str | Path | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a model in evaluation mode and one dtype, every dropout set to zero, its cache of keys and values off.

    While a DeepSpeed ZeRO-3 configuration of transformers is alive (and ``deepspeed.init_distributed`` has been
    called), weights are partitioned as they are read and DeepSpeed decides where they lie; else they are moved to
    ``device``.

    Args:
        path: A folder, or the id of a model on the Hub.
        dtype: Of the weights and of the computation.
        attention: A kernel from :func:`~.attention_choice.resolve_attention`.
        device: Where the weights go.
        adapter: A folder with a peft adapter to put on top; its weights can then be trained.
        quantization: What the weights are quantized to as they are read, ``nf4``; None to leave them as they are.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model of transformers, or the peft model around it.

    Raises:
        DpoCacheError: Nothing to load there, weights missing from the checkpoint, a kernel that the model or the
            device does not support, a package that is not installed, or an activated LoRA.
    """
    _refuse_kernel_out_of_place(attention, torch.device(device))
    config = load_config(path, trust_remote_code=trust_remote_code)
    set_dropout_to_zero(config)
    quantizing = loading_options(quantization, config, dtype=dtype, device=device)
    base = _read_model(
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        **quantizing,
    )
    if base.config._attn_implementation != attention:
        raise DpoCacheError(
            f"the model {path} was loaded with {base.config._attn_implementation} attention",
            expected=attention,
            next_step=f"--attn-implementation {base.config._attn_implementation}",
        )
    if quantizing or not getattr(base, "is_quantized", False):
        _bring_to_one_dtype(base, dtype)
    prepare_quantized_layers(base)
    base.config.use_cache = False
    model: nn.Module = base if adapter is None else _with_adapter(base, adapter)
    set_module_dropout_to_zero(model)
    model.eval()
    if not is_deepspeed_zero3_enabled():
        model.to(device)
    return model


def _read_model(path: str | Path, **options: Any) -> Any:
    """The model as transformers reads it, every weight found in its place."""
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise DpoCacheError(f"the model {path} cannot be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise DpoCacheError(
            f"weights of {path} have other shapes than its config.json says; transformers lists them above",
            next_step="download or save the model again, both together",
        ) from error
    _refuse_incomplete(path, loading)
    return model


def _bring_to_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that transformers keeps in float32, such as a router's, as DeepSpeed does with all it trains.

    Else the reference would be computed with them and the policy without. Codes of quantized weights are no
    floating-point numbers and stay; so do buffers, which DeepSpeed leaves alone too.
    """
    kept = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != dtype
    }
    for parameter in kept.values():
        parameter.data = parameter.data.to(dtype)
    if kept:
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in kept})
        log.warning(
            "weights that transformers keeps in float32 are brought to %s: %s",
            str(dtype).removeprefix("torch."),
            ", ".join(kinds),
        )


def _refuse_kernel_out_of_place(attention: str, device: torch.device) -> None:
    if attention in GPU_KERNELS and device.type != "cuda":
        raise DpoCacheError(
            f"--attn-implementation {attention} runs on a GPU, and this is a {device.type}",
            next_step="--attn-implementation sdpa; in training from a cache that was scored otherwise, with "
            "--allow-numerics-mismatch",
        )
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise DpoCacheError(
            "--attn-implementation flash_attention_2 needs the package flash-attn, which is not installed",
            next_step="pip install flash-attn --no-build-isolation, or --attn-implementation sdpa",
        )


def find_causal_lm(model: nn.Module) -> Any:
    """The model of transformers inside a peft model, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def find_backbone(model: nn.Module) -> Any:
    """All of a causal language model but its vocabulary head.

    Raises:
        DpoCacheError: The model does not keep them apart, as code from the Hub may not.
    """
    causal_lm = find_causal_lm(model)
    backbone = causal_lm.base_model
    if backbone is causal_lm:
        raise DpoCacheError(
            f"{type(causal_lm).__name__} has no backbone under its base_model_prefix {causal_lm.base_model_prefix!r}",
            expected="a causal language model built as backbone and vocabulary head",
        )
    return backbone


def find_head(model: nn.Module) -> nn.Linear:
    """The vocabulary head of a causal language model."""
    head: nn.Linear = find_causal_lm(model).get_output_embeddings()
    return head


def noise_of(config: Any) -> dict[str, float]:
    """The dropout probabilities and router jitters of a config and its text part that are not zero."""
    return {name: value for part in _parts(config) for name, value in vars(part).items() if is_noise(name, value)}


def set_dropout_to_zero(config: Any) -> None:
    """Set every dropout probability and router jitter of a config to zero, of its text part too."""
    for part in _parts(config):
        for name in noise_of(part):
            setattr(part, name, 0.0)


def _parts(config: Any) -> list[Any]:
    return list({id(part): part for part in (config, config.get_text_config())}.values())


def set_module_dropout_to_zero(model: nn.Module) -> None:
    """The same for the modules: some take a probability from elsewhere, an adapter brings its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if is_noise(name, value):
                setattr(module, name, 0.0)


def is_noise(name: str, value: object) -> bool:
    """Whether a setting of a model's config or module adds chance to its passes: dropout, router jitter."""
    return is_noise_name(name) and isinstance(value, float) and value > 0.0


def is_noise_name(name: str) -> bool:
    """Whether a setting of this name would add chance to a model's passes, whatever its value."""
    return any(word in name for word in ("dropout", "pdrop", "layerdrop", "drop_path", "jitter_noise"))


def _with_adapter(model: nn.Module, adapter: str | Path) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DpoCacheError(
            f"--adapter {adapter} needs peft, which is not installed", next_step="pip install 'dpo-cache[lora]'"
        ) from error
    try:
        adapted: nn.Module = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (OSError, ValueError) as error:
        raise DpoCacheError(f"the adapter {adapter} cannot be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise DpoCacheError(
            f"the adapter {adapter} does not fit the weights of its base: {str(error).splitlines()[1].strip()}",
            expected="the model that the adapter was trained on",
            next_step="if tokens were added for the adapter, resize the model's embeddings as was done then, merge the "
            "adapter (peft's merge_and_unload), and build with the merged model",
        ) from error
    if getattr(adapted.active_peft_config, "alora_invocation_tokens", None):
        # peft looks for those tokens outside the modules that we call: without that the adapter has no effect.
        raise DpoCacheError(
            f"the adapter {adapter} is an activated LoRA, which works only from its invocation tokens on",
            expected="an adapter that works on every token",
        )
    return adapted


def _refuse_incomplete(path: str | Path, loading: dict[str, Any]) -> None:
    """Weights that a checkpoint lacks would be random: transformers only warns."""
    absent = sorted(loading["missing_keys"])
    if absent:
        raise DpoCacheError(
            f"the checkpoint {path} lacks {len(absent)} of the model's weights: {', '.join(absent[:5])}",
            expected="every weight of a causal language model, its vocabulary head included",
        )

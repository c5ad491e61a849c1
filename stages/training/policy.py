"""Where the policy starts, and loading it for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.message_value import message_value
from ...pipeline.cache.reference_identity import ReferenceIdentity, differences
from ...pipeline.scoring.model_loading import load_causal_lm
from ...pipeline.scoring.pair_scorer import SCORING_VERSION
from ...pipeline.scoring.quantization import quantized_layers
from ...pipeline.training.activation_checkpointing import recompute_activations
from ...pipeline.training.deepspeed_config import partitioned_loading
from ...pipeline.training.expert_blocks import gather_expert_blocks_whole, refuse_load_balancing
from ...pipeline.training.liger_layers import use_liger_layers
from ...pipeline.training.lora_adapter import LoraSettings, add_lora, merge_adapter, refuse_unmergeable
from ..hub.model_folder import ModelFolder, find_model_folder
from ..hub.model_identity import identity_to_compare
from ..hub.recorded_reference import RecordedReference
from .recipe import Recipe
from .train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOrigin:
    """The checkpoint that a policy starts from.

    Attributes:
        model: Its files.
        is_reference: Whether it is, byte for byte, what the cache was scored with; then the proof at step 0 holds.
            An adapter that has not been trained yet changes nothing about that.
        sha256: Digest of all that its values depend on.
    """

    model: ModelFolder
    is_reference: bool
    sha256: str


def find_policy(config: TrainConfig, cache: ReferenceCache) -> ModelFolder:
    """The files of the policy's first weights: ``--model``, or the reference by the names the cache recorded.

    Raises:
        DpoCacheError: They are not to be found, or an adapter is to be trained on a reference that has one.
    """
    if config.model is not None:
        return find_model_folder(config.model, config.model_revision)
    recorded = RecordedReference.of(cache.recorded)
    with _reference_is_here(recorded.name, part="model", remedy="name it: --model PATH_OR_ID"):
        model = recorded.find_model()
    if cache.identity.adapter_sha256 is None:
        return model
    if config.saves_adapter:
        raise DpoCacheError(
            "--use-lora would save an adapter that belongs on neither the base nor the adapter of this reference",
            expected="a whole model, or a reference without an adapter",
            next_step="add --merge, or build a cache with the reference's adapter merged into its base",
        )
    if config.quantization:
        raise DpoCacheError(
            "--use-qlora cannot start at a reference with an adapter, which cannot be added to quantized weights",
            expected="a reference that is a whole model",
            next_step="merge it into its base (peft's merge_and_unload) and build a cache with that",
        )
    remedy = "put it back, or merge it into its base (peft's merge_and_unload) and build a cache with that"
    with _reference_is_here(recorded.adapter or "unnamed adapter", part="adapter", remedy=remedy):
        return replace(model, adapter=recorded.find_adapter())


@contextmanager
def _reference_is_here(name: str, *, part: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except DpoCacheError as missing:
        raise DpoCacheError(
            f"the cache's reference {name} is not to be found here: {missing.found}",
            expected=f"the {part} that the policy starts from",
            next_step=remedy,
        ) from missing


def check_policy(config: TrainConfig, reference: ReferenceIdentity, model: ModelFolder) -> PolicyOrigin:
    """Compare the policy's files with the cache's reference.

    Raises:
        DpoCacheError: They differ and ``--allow-other-policy`` was not given, naming each field that differs; or
            another version of the scoring code made the cache.
    """
    if reference.scoring_version != SCORING_VERSION:
        raise DpoCacheError(
            f"the cache was scored by version {reference.scoring_version} of the scoring code",
            expected=f"version {SCORING_VERSION}",
            next_step="build a new cache, or use the dpo-cache that made this one",
        )
    identity = identity_to_compare(model, reference, trust_remote_code=config.trust_remote_code)
    found = differences(reference, identity)
    if found and not config.allow_other_policy:
        fields = "; ".join(
            f"{name}: cache {message_value(ours)}, policy {message_value(theirs)}" for name, ours, theirs in found
        )
        raise DpoCacheError(
            f"the policy {model.name} is not the reference of this cache ({fields})",
            expected="a policy that starts from the reference, as DPO is defined",
            next_step="leave --model out, or add --allow-other-policy if the policy is meant to start elsewhere",
        )
    return PolicyOrigin(model=model, is_reference=not found, sha256=identity.digest)


def load_policy(
    config: TrainConfig, recipe: Recipe, model: ModelFolder, device: torch.device, engine_config: dict[str, Any]
) -> nn.Module:
    """Load the policy's first weights, at ZeRO stage 3 partitioned over the ranks as they are read.

    Args:
        config: The settings.
        recipe: The resolved numbers.
        model: The files.
        device: This rank's device.
        engine_config: DeepSpeed's.

    Raises:
        DpoCacheError: The model cannot be loaded, or cannot be trained in this way.
    """
    with partitioned_loading(engine_config):
        policy: Any = load_causal_lm(
            model.folder,
            dtype=getattr(torch, recipe.dtype),
            attention=recipe.attention,
            device=device,
            adapter=model.adapter_folder,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
        )
    is_partitioned = (hasattr(weight, "ds_id") for weight in policy.parameters())
    # The reference's adapter is put on whole, after the model has been read.
    assert recipe.zero_stage != 3 or (any(is_partitioned) if model.adapter else all(is_partitioned)), (
        "every rank has read the whole model: at stage 3 it has to be partitioned while it is read"
    )
    if quantized_layers(policy) and not config.quantization:
        raise DpoCacheError(
            f"the weights of {model.name} are quantized in the checkpoint itself, and cannot be trained",
            expected="full weights",
            next_step="take the model that it was made from; --use-qlora quantizes it as it is loaded",
        )
    if model.adapter:
        policy = merge_adapter(policy)
    if config.load_balancing_loss:
        refuse_load_balancing(policy)
    if config.use_liger_kernel:
        use_liger_layers(policy)
    lora = config.resolved_lora()
    if lora is not None:
        targets = tuple(lora["target_modules"])
        settings = LoraSettings(rank=lora["rank"], alpha=lora["alpha"], target_modules=targets, seed=config.seed)
        policy = add_lora(policy, settings)
        if config.merge:
            refuse_unmergeable(policy)
    if config.share_of_kept_activations < 1.0:
        recompute_activations(policy, kept_share=config.share_of_kept_activations)
    gather_expert_blocks_whole(policy)
    module: nn.Module = policy
    return module

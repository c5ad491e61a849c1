"""Every number of a run, worked out from the settings, the mixture and the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.pair_order import epoch_order
from ...pipeline.cache.reference_identity import ReferenceIdentity
from ...pipeline.training.deepspeed_config import TRAINED_DTYPES
from ...pipeline.training.global_batches import GlobalBatchPlan
from ...pipeline.training.learning_rate import learning_rate, warmup_steps
from ...pipeline.training.objective import Objective, beta_warnings
from ..console.counted_noun import counted
from .train_config import TrainConfig

FIXED_IN_A_RUN = {
    "mixture": "mixture_digest",
    "reference": "reference_id",
    "attn_implementation": "attention",
    "loss": "loss",
    "dtype": "dtype",
    "global_batch_size": "global_batch_size",
    "total_steps": "total_steps",
    "warmup_steps": "warmup_steps",
    "learning_rate": "peak_learning_rate",
    "lr_scheduler_type": "schedule",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "lora": "lora",
    "load_balancing_weight": "load_balancing_weight",
}
"""What may not change between two starts of a run, named after its option where there is one; and what
:meth:`Recipe.to_json` calls it. All other numbers concern memory and speed alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The resolved numbers of a run, the same on all ranks.

    Attributes:
        objective: What is minimised, with its numbers.
        dtype: Precision of the forward pass.
        attention: The attention kernel.
        num_ranks: Processes that train together.
        num_pairs: Training pairs of the mixture.
        global_batch_size: Pairs in one update.
        steps_per_epoch: Updates in one pass over the mixture.
        total_steps: Updates of the run.
        warmup_steps: Updates over which the learning rate rises.
        peak_learning_rate: The rate after warm-up.
        schedule: Shape of the rate after warm-up.
        weight_decay, adam_beta1, adam_beta2, adam_epsilon: AdamW's.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        tokens_per_microbatch: Token budget of one forward and backward pass.
        zero_stage: What DeepSpeed partitions over the ranks.
        lora: The adapter's numbers; None where all weights are trained.
        load_balancing_weight: Weight of a mixture of experts' auxiliary loss; None without.
        mixture_digest: The training set.
        reference_id: The cache's reference.
        seed: Decides the order.
    """

    objective: Objective
    dtype: str
    attention: str
    num_ranks: int
    num_pairs: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_learning_rate: float
    schedule: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    tokens_per_microbatch: int
    zero_stage: int
    lora: dict[str, Any] | None
    load_balancing_weight: float | None
    mixture_digest: str
    reference_id: str
    seed: int

    def learning_rate(self, step: int) -> float:
        """The rate of update ``step``, counted from 0."""
        return learning_rate(
            step,
            peak=self.peak_learning_rate,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def resume_fingerprint(self, policy_sha256: str) -> dict[str, Any]:
        """What has to be the same for a run to be resumed exactly; the number of ranks may change.

        Args:
            policy_sha256: Of the weights that the policy started from.
        """
        return {"policy": policy_sha256, **fixed_numbers(self.to_json())}

    def rates(self) -> dict[int, float]:
        """The learning rate of the updates people look at, counted from 1 as in the metrics."""
        updates = {1, 2, self.warmup_steps + 1, self.total_steps}
        return {update: self.learning_rate(update - 1) for update in sorted(updates) if update <= self.total_steps}

    def to_json(self) -> dict[str, Any]:
        """All of it, with :meth:`rates`; the objective under ``loss``, as the option is called."""
        numbers = asdict(self)
        del numbers["objective"]
        return {
            "loss": self.objective.to_json(),
            **numbers,
            "learning_rate_at_update": {str(update): rate for update, rate in self.rates().items()},
        }


def fixed_numbers(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the results of a run depend on, beside its first weights, under the names of :data:`FIXED_IN_A_RUN`.

    Args:
        recipe: :meth:`Recipe.to_json`, as ``config.json`` of a run has it too.
    """
    return {name: recipe.get(number) for name, number in FIXED_IN_A_RUN.items()}


def resolve_recipe(config: TrainConfig, cache: ReferenceCache, mixture: Mixture, *, num_ranks: int) -> Recipe:
    """Work out all numbers of a run.

    Raises:
        DpoCacheError: A number that does not fit the objective, or numerics other than the cache's.
    """
    identity = cache.identity
    refuse_other_numerics(config, identity)
    global_batch_size = config.resolved_global_batch_size(num_ranks)
    batches = global_batches(mixture, global_batch_size, config.seed)
    total_steps = batches.total_steps(num_epochs=config.num_train_epochs, max_steps=config.max_steps)
    if config.stop_after_steps is not None and config.stop_after_steps >= total_steps:
        raise DpoCacheError(
            f"--stop-after-steps is {config.stop_after_steps}, but the run has {counted(total_steps, 'update')}",
            expected="fewer than the run has",
            next_step="leave out --stop-after-steps to train to the end",
        )
    dtype = config.dtype or identity.compute_dtype
    if dtype not in TRAINED_DTYPES:
        raise DpoCacheError(
            f"the cache was scored in {dtype}, in which nothing is trained here",
            expected=" or ".join(TRAINED_DTYPES),
            next_step="build a cache with --dtype bfloat16, or add --dtype bfloat16 --allow-numerics-mismatch",
        )
    return Recipe(
        objective=config.resolved_objective(),
        dtype=dtype,
        attention=config.attn_implementation or identity.attention,
        num_ranks=num_ranks,
        num_pairs=mixture.num_pairs,
        global_batch_size=global_batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_steps(config.warmup_ratio, total_steps),
        peak_learning_rate=config.learning_rate,
        schedule=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        tokens_per_microbatch=config.tokens_per_microbatch or int(mixture.shared_prefix_lengths().max()),
        zero_stage=config.zero_stage,
        lora=config.resolved_lora(),
        load_balancing_weight=config.resolved_load_balancing_weight(),
        mixture_digest=mixture.digest,
        reference_id=cache.reference_id,
        seed=config.seed,
    )


def global_batches(mixture: Mixture, global_batch_size: int, seed: int) -> GlobalBatchPlan:
    """Which pairs make up each update: a function of the mixture, the seed and the epoch alone."""

    def order(epoch: int) -> npt.NDArray[np.int32]:
        return epoch_order(
            num_pairs=mixture.num_pairs,
            block_rows=mixture.block_rows,
            seed=seed,
            epoch=epoch,
            mixture_digest=mixture.digest,
        )

    return GlobalBatchPlan(num_pairs=mixture.num_pairs, global_batch_size=global_batch_size, epoch_order=order)


def warnings_of(recipe: Recipe) -> list[str]:
    """What looks wrong about the numbers without being impossible."""
    warnings = beta_warnings(recipe.objective)
    if recipe.zero_stage == 0 and recipe.dtype == "bfloat16":
        warnings.append(
            "at --zero-stage 0 DeepSpeed accumulates bfloat16 gradients in bfloat16; from stage 1 on it uses float32"
        )
    return warnings


def refuse_other_numerics(config: TrainConfig, identity: ReferenceIdentity) -> None:
    """Refuse a dtype, an attention kernel or a quantization other than the reference was scored with.

    Raises:
        DpoCacheError: They differ and ``--allow-numerics-mismatch`` was not given.
    """
    if config.allow_numerics_mismatch:
        return
    for flag, ours, cached in (
        ("--dtype", config.dtype, identity.compute_dtype),
        ("--attn-implementation", config.attn_implementation, identity.attention),
    ):
        if ours not in (None, cached):
            raise DpoCacheError(
                f"{flag} is {ours}, and the cache was scored with {cached}: policy and reference would differ by "
                "rounding before any update",
                expected=f"{flag} {cached}",
                next_step=f"leave out {flag}, build a cache with {ours}, or add --allow-numerics-mismatch",
            )
    if config.quantization == identity.quantization:
        return
    if config.quantization:
        found = f"--use-qlora quantizes the policy to {config.quantization}, and the cache was scored with full weights"
        remedy = f"leave out --use-qlora, build a cache with --quantization {config.quantization}"
    else:
        found = f"the cache was scored with weights quantized to {identity.quantization}, and the policy's are full"
        remedy = "add --use-qlora, build a cache without --quantization"
    raise DpoCacheError(
        f"{found} (quantization: cache {identity.quantization}, policy {config.quantization}): policy and reference "
        "would differ by the quantization before any update",
        expected="a reference with the same quantization as the policy",
        next_step=f"{remedy}, or add --allow-numerics-mismatch",
    )

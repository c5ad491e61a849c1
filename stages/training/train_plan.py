"""Every number of a run, and what looks wrong about them, as ``dpo-train --plan`` and every run print them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ..console.counted_noun import counted
from ..hub.recorded_reference import RecordedReference
from .held_out_overlap import overlap_warnings
from .recipe import Recipe, warnings_of
from .train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """A run that would start now.

    Attributes:
        recipe: Its resolved numbers.
        policy: Where the policy starts.
        evaluation: On which pairs and when.
        memory: What keeps its memory down.
        checkpoints: When they are saved and which are kept.
        warnings: What looks wrong without being impossible.
    """

    recipe: Recipe
    policy: str
    evaluation: str
    memory: str
    checkpoints: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``: the numbers, and the rest in words."""
        return {
            **self.recipe.to_json(),
            "policy": self.policy,
            "evaluation": self.evaluation,
            "memory": self.memory,
            "checkpoints": self.checkpoints,
            "warnings": list(self.warnings),
        }

    def summary(self) -> str:
        """For a terminal."""
        recipe = self.recipe
        rates = ", ".join(f"{update}: {rate:.3g}" for update, rate in recipe.rates().items())
        lines = {
            "policy": self.policy,
            "pairs": f"{counted(recipe.num_pairs, 'pair')}, {recipe.global_batch_size:,} per update on "
            f"{counted(recipe.num_ranks, 'rank')}",
            "updates": f"{recipe.total_steps:,} in all, {recipe.steps_per_epoch:,} per epoch",
            "loss": recipe.objective.summary(),
            "learning rate": f"{recipe.peak_learning_rate:g}, {recipe.schedule}, "
            f"{counted(recipe.warmup_steps, 'update')} of warm-up; at update {rates}",
            "AdamW": f"betas {recipe.adam_beta1:g} and {recipe.adam_beta2:g}, epsilon {recipe.adam_epsilon:g}, weight "
            f"decay {recipe.weight_decay:g}; "
            + (f"gradients clipped at norm {recipe.max_grad_norm:g}" if recipe.max_grad_norm else "no clipping"),
            "numerics": f"{recipe.dtype}, attention {recipe.attention}",
            "memory": self.memory,
            "evaluation": self.evaluation,
            "checkpoints": self.checkpoints,
        }
        width = max(map(len, lines))
        return "\n".join(
            [
                *(f"{name:{width}}  {text}" for name, text in lines.items()),
                *(f"warning: {warning}" for warning in self.warnings),
            ]
        )


def plan_of(
    config: TrainConfig, recipe: Recipe, cache: ReferenceCache, mixture: Mixture, evaluation: Mixture | None
) -> TrainPlan:
    """What would be run; neither weights nor shards are opened."""
    return TrainPlan(
        recipe=recipe,
        policy=_policy(config, recipe, cache),
        evaluation=_evaluation(config, evaluation),
        memory=_memory(config, recipe),
        checkpoints=_checkpoints(config),
        warnings=(*warnings_of(recipe), *overlap_warnings(mixture, evaluation)),
    )


def _policy(config: TrainConfig, recipe: Recipe, cache: ReferenceCache) -> str:
    start = config.model or f"{RecordedReference.of(cache.recorded).name}, the cache's reference"
    if recipe.lora is None:
        return f"{start}; all weights are trained"
    kind = "QLoRA" if config.quantization else "LoRA"
    numbers = f"rank {recipe.lora['rank']}, alpha {recipe.lora['alpha']:g}, {', '.join(recipe.lora['target_modules'])}"
    saved = "saved as an adapter" if config.saves_adapter else "merged into a whole model at the end"
    return f"{start}; {kind} adapter ({numbers}), {saved}"


def _evaluation(config: TrainConfig, evaluation: Mixture | None) -> str:
    if evaluation is None:
        return "none"
    between = "" if config.eval_steps is None else f", {_every(config.eval_steps)}"
    best = "" if config.keep_best is None else f"; the best model by {config.keep_best} is kept"
    return (
        f"{counted(evaluation.num_pairs, 'pair')} of mixture {evaluation.name}, before the first update{between} and "
        f"after the last{best}"
    )


def _memory(config: TrainConfig, recipe: Recipe) -> str:
    parts = [
        f"ZeRO stage {recipe.zero_stage}",
        f"micro-batches of at most {counted(recipe.tokens_per_microbatch, 'token')}, or one longer pair",
        _activations(config.share_of_kept_activations),
    ]
    if config.offload_optimizer:
        parts.append("optimizer state in host memory")
    if config.offload_parameters:
        parts.append("weights in host memory")
    return "; ".join(parts)


def _activations(kept_share: float) -> str:
    if kept_share == 1.0:
        return "activations are kept"
    if kept_share == 0.0:
        return "activations are recomputed"
    return f"{kept_share:.0%} of the layers keep their activations, the others recompute them"


def _checkpoints(config: TrainConfig) -> str:
    keep = config.keep_last_n_checkpoints
    between = "" if config.checkpointing_steps is None else f"{_every(config.checkpointing_steps)} and "
    kept = "all are kept" if keep == -1 else "the last one is kept" if keep == 1 else f"the last {keep} are kept"
    every = config.model_saving_steps
    models = "" if every is None else f"; a model is saved {_every(every)}"
    return f"{between}at the end; {kept}{models}"


def _every(updates: int) -> str:
    return "after every update" if updates == 1 else f"every {updates:,} updates"

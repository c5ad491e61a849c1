"""The README of a trained model: what it was trained from, how, and with which results. No paths of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.finite_json import finite_json
from ..hub.model_folder import ModelFolder
from ..hub.public_name import public_name
from ..hub.recorded_reference import RecordedReference
from .recipe import Recipe
from .train_config import TrainConfig

NOT_RECIPE = {"mixture_digest", "reference_id", "learning_rate_at_update"}


def model_card(
    config: TrainConfig,
    recipe: Recipe,
    *,
    name: str,
    base: ModelFolder,
    cache: ReferenceCache,
    mixture: Mixture,
    last_line: Mapping[str, float],
    evaluation: Mapping[str, float] | None,
) -> str:
    """The card as Markdown, with the header that the Hub reads.

    Args:
        config: The settings.
        recipe: The resolved numbers.
        name: Of the model.
        base: What training started from; named in the header only if it is on the Hub.
        cache: Whose reference the policy was held to.
        mixture: The pairs.
        last_line: The last logged step.
        evaluation: The last evaluation.
    """
    header = [f"library_name: {'peft' if config.saves_adapter else 'transformers'}"]
    if base.commit is not None:
        header.append(f"base_model: {base.name}")
    header += ["tags:", "- dpo", "- dpo-cache"]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {name}",
            "",
            f"{public_name(base.name)}, fine-tuned with DPO on preference pairs, with cached reference "
            "log-probabilities (dpo-cache).",
            "",
            "## Recipe",
            "",
            "```json",
            finite_json(_numbers(recipe), indent=2),
            "```",
            "",
            "## Reference and pairs",
            "",
            *_table(_origin(base, cache, mixture)),
            "",
            "## Metrics",
            "",
            *_table({field: f"{value:.6g}" for field, value in {**last_line, **(evaluation or {})}.items()}),
            "",
        ]
    )


def _numbers(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_json().items() if key not in NOT_RECIPE}


def _origin(base: ModelFolder, cache: ReferenceCache, mixture: Mixture) -> dict[str, str]:
    """What the policy was held to and trained on."""
    identity = cache.identity
    template = (mixture.tokenization.get("chat_template") or {}).get("name")
    return {
        "reference": public_name(RecordedReference.of(cache.recorded).model or base.name),
        "cache identity": f"`{cache.reference_id}`",
        "reference weights, SHA-256": f"`{identity.weights_sha256}`",
        "scored in": f"{identity.precision}, {identity.attention} attention",
        "mixture": f"{mixture.name}, {mixture.num_pairs} pairs, digest `{mixture.digest}`",
        **({"chat template": template} if template not in (None, "tokenizer") else {}),
    }


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]

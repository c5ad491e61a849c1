"""The README of a trained model: what it was trained from, how, and with which results. No paths of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
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
    numbers = {key: value for key, value in recipe.to_json().items() if key not in NOT_RECIPE}
    identity = cache.identity
    template = (mixture.tokenization.get("chat_template") or {}).get("name")
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
            json.dumps(numbers, indent=2),
            "```",
            "",
            "## Reference and pairs",
            "",
            "| | |",
            "|---|---|",
            f"| reference | {public_name(RecordedReference.of(cache.recorded).model or base.name)} |",
            f"| cache identity | `{cache.reference_id}` |",
            f"| reference weights, SHA-256 | `{identity.weights_sha256}` |",
            f"| scored in | {identity.precision}, {identity.attention} attention |",
            f"| mixture | {mixture.name}, {mixture.num_pairs} pairs, digest `{mixture.digest}` |",
            *([f"| chat template | {template} |"] if template not in (None, "tokenizer") else []),
            "",
            "## Metrics",
            "",
            "| | |",
            "|---|---|",
            *(f"| {field} | {value:.6g} |" for field, value in {**last_line, **(evaluation or {})}.items()),
            "",
        ]
    )

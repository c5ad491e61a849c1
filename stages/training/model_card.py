"""The README of a trained model: what it was trained from, how, and with which results. No paths of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pipeline.data.printable_text import one_line
from ...pipeline.finite_json import finite_json
from ..hub.public_name import public_name
from ..hub.recorded_reference import RecordedReference
from .prepared_run import PreparedRun
from .recipe import Recipe

NOT_RECIPE = {"mixture_digest", "reference_id", "learning_rate_at_update"}


def model_card(run: PreparedRun, line: Mapping[str, float], evaluation: Mapping[str, float] | None) -> str:
    """The card as Markdown, with the header that the Hub reads.

    Args:
        run: What the model came of.
        line: The last logged step.
        evaluation: The last evaluation.
    """
    base = run.origin.model
    header = [f"library_name: {'peft' if run.config.saves_adapter else 'transformers'}"]
    if base.commit is not None:  # only what is on the Hub can be named there
        header.append(f"base_model: {base.name}")
    header += ["tags:", "- dpo", "- dpo-cache"]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {run.config.resolved_run_name}",
            "",
            f"{public_name(base.name)}, fine-tuned with DPO on preference pairs, with cached reference "
            "log-probabilities (dpo-cache).",
            "",
            "## Recipe",
            "",
            "```json",
            finite_json(_numbers(run.recipe), indent=2),
            "```",
            "",
            "## Reference and pairs",
            "",
            *_table(_origin(run)),
            "",
            "## Metrics",
            "",
            *_table({field: f"{value:.6g}" for field, value in {**line, **(evaluation or {})}.items()}),
            "",
        ]
    )


def _numbers(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_json().items() if key not in NOT_RECIPE}


def _origin(run: PreparedRun) -> dict[str, str]:
    """What the policy was held to and trained on."""
    cache, mixture = run.pairs.cache, run.pairs.mixture
    identity = cache.identity
    template = (mixture.tokenization.get("chat_template") or {}).get("name")
    return {
        "reference": public_name(RecordedReference.of(cache.recorded).model or run.origin.model.name),
        "cache identity": f"`{cache.reference_id}`",
        "reference weights, SHA-256": f"`{identity.weights_sha256}`",
        "scored in": f"{identity.precision}, {identity.attention} attention",
        "mixture": f"{mixture.name}, {mixture.num_pairs} pairs, digest `{mixture.digest}`",
        **({"chat template": template} if template not in (None, "tokenizer") else {}),
    }


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {one_line(value)} |" for name, value in rows.items())]

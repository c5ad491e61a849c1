"""What each run was trained with: the settings that decide its result, with their defaults resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .page_content import SettingsTable
from .run_record import RunRecord

UNKNOWN = "–"


def settings_table(runs: Sequence[RunRecord]) -> SettingsTable | None:
    """A row a setting, a column a run; None where no run has recorded any."""
    columns = [settings_of_run(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    if not names:
        return None
    return SettingsTable(rows=[(name, [column.get(name, UNKNOWN) for column in columns]) for name in names])


def settings_of_run(run: RunRecord) -> dict[str, str]:
    """The settings of one run as people name them; empty where its ``config.json`` is missing or cannot be read."""
    if not (run.settings and run.resolved):
        return {}
    given, resolved = run.settings, run.resolved
    loss = _object(resolved.get("loss"))
    losses = loss.get("losses")
    terms = [_object(term) for term in losses] if isinstance(losses, list) else []
    return {
        "loss": _loss(loss, terms),
        "beta": ", ".join(_text(term.get("beta")) for term in terms) or UNKNOWN,
        "peak learning rate": _text(resolved.get("peak_learning_rate")),
        "schedule": f"{_text(resolved.get('schedule'))}, {_text(resolved.get('warmup_steps'))} updates of warm-up",
        "pairs per update": _text(resolved.get("global_batch_size")),
        "updates": _text(resolved.get("total_steps")),
        "updates per epoch": _text(resolved.get("steps_per_epoch")),
        "weight decay": _text(resolved.get("weight_decay")),
        "gradients clipped at norm": _text(resolved.get("max_grad_norm")),
        "trained": _trained(resolved.get("lora")),
        "dtype": _text(resolved.get("dtype")),
        "attention": _text(resolved.get("attention")),
        "ZeRO stage": _text(resolved.get("zero_stage")),
        "ranks": _text(resolved.get("num_ranks")),
        "tokens per micro-batch": _text(resolved.get("tokens_per_microbatch")),
        "seed": _text(resolved.get("seed")),
        "training mixture": _text(given.get("mixture")),
        "evaluation mixture": _text(given.get("eval_mixture"), unset="none"),
    }


def _loss(loss: dict[str, Any], terms: Sequence[dict[str, Any]]) -> str:
    is_sum = len(terms) > 1
    names = [
        f"{_text(term.get('weight'))} × {_text(term.get('name'))}" if is_sum else _text(term.get("name"))
        for term in terms
    ]
    extras = [
        f"{title} {_text(value)}"
        for title, value, plain in (
            ("label smoothing", terms[0].get("label_smoothing") if terms else None, 0.0),
            ("f-divergence", loss.get("f_divergence"), "reverse_kl"),
            ("LD alpha", loss.get("ld_alpha"), 1.0),
            ("NLL coefficient", loss.get("nll_coef"), 0.0),
        )
        if value not in (None, plain)
    ]
    return ", ".join([" + ".join(names) or UNKNOWN, *extras])


def _trained(lora: Any) -> str:
    if lora is None:
        return "all weights"
    adapter = _object(lora)
    kind = f"an adapter on {adapter['quantization']} weights" if "quantization" in adapter else "a LoRA adapter"
    return f"{kind}, rank {_text(adapter.get('rank'))}, alpha {_text(adapter.get('alpha'))}"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any, *, unset: str = UNKNOWN) -> str:
    if value is None:
        return unset
    return f"{value:g}" if isinstance(value, float) else str(value)

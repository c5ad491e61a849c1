"""Folders as runs leave them, written without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NUM_PAIRS, GLOBAL_BATCH = 100, 8
STEPS_PER_EPOCH = 13
STEP_FIELDS = (
    *("train_loss", "rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen_per_token", "logps/rejected_per_token", "learning_rate", "grad_norm"),
    *("perf/tokens_per_second", "perf/peak_memory_gib"),
)
EVAL_FIELDS = (
    *("eval/loss", "eval/rewards/accuracy", "eval/rewards/margin", "eval/rewards/chosen", "eval/rewards/rejected"),
    *("eval/logps/chosen_per_token", "eval/logps/rejected_per_token"),
)


def step_seconds(step: int) -> float:
    """How long update ``step``, counted from 1, took: no two alike."""
    return 1.0 + 0.25 * step


def write_run(
    folder: Path,
    *,
    updates: int = STEPS_PER_EPOCH,
    total: int = STEPS_PER_EPOCH,
    evaluate_every: int | None = 5,
    settings: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
    level: float = 0.0,
    margins: Sequence[tuple[str, float]] = (),
) -> Path:
    """A run of an epoch of 100 pairs, 8 in an update.

    Args:
        folder: The run's.
        updates: Done.
        total: Of the whole run; with as many done it is finished.
        evaluate_every: None for no evaluations.
        settings, resolved: Of ``config.json``, over those that every run has.
        level: Added to the held-out accuracy.
        margins: Keys and margins of held-out pairs.
    """
    folder.mkdir(parents=True)
    given = {"cache": "gone", "mixture": "train", "eval_mixture": "held-out", "loss": "dpo_norm", "beta": 5.0}
    numbers = {
        **{"total_steps": total, "num_pairs": NUM_PAIRS, "global_batch_size": GLOBAL_BATCH, "seed": 42},
        **{"reference_id": "c" * 64, "mixture_digest": "d" * 64},
        "loss": {"losses": [{"name": "dpo_norm", "beta": 5.0, "weight": 1.0}]},
    }
    config = {"settings": {**given, **(settings or {})}, "resolved": {**numbers, **(resolved or {})}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [evaluation(0, level)] if evaluate_every else []
    for step in range(1, updates + 1):
        lines.append(step_line(step))
        if evaluate_every and (step % evaluate_every == 0 or step == total):
            lines.append(evaluation(step, level))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    proof = {
        **{"dtype": "float32", "pairs": 8, "sides": 16, "mean_per_token": 1e-7, "max_per_token": 3.2e-7},
        **{
            "max_in_bounds": 3.2e-3,
            "bound_per_token": 1e-4,
            "loss": math.log(2),
            "expected_loss": math.log(2),
            "within_bound": True,
        },
    }
    (folder / "step0.json").write_text(json.dumps(proof), encoding="utf-8")
    if updates == total:
        (folder / "summary.json").write_text(json.dumps({"steps": total}), encoding="utf-8")
    if margins:
        written = [{"training_step": updates, "key": key, "rewards/margin": margin} for key, margin in margins]
        text = "".join(json.dumps(line) + "\n" for line in written)
        (folder / "eval_margins.jsonl").write_text(text, encoding="utf-8")
    return folder


def step_line(step: int) -> dict[str, float]:
    """The line of an update: values that tell step and field apart, and a speed that gives the time it took."""
    pairs_before, pairs_after = (min(NUM_PAIRS, GLOBAL_BATCH * done) for done in (step - 1, step))
    values = {field: 0.1 * place + 0.013 * step for place, field in enumerate(STEP_FIELDS)}
    return {
        "training_step": step,
        "epoch": pairs_after / NUM_PAIRS,
        **values,
        "perf/pairs_per_second": (pairs_after - pairs_before) / step_seconds(step),
    }


def evaluation(step: int, level: float = 0.0) -> dict[str, float]:
    """The line of an evaluation."""
    values = {field: 0.07 * place + 0.011 * step for place, field in enumerate(EVAL_FIELDS)}
    values["eval/rewards/accuracy"] = 0.5 + level + 0.01 * step
    return {"training_step": step, **values, "eval/perf/tokens_per_second": 1.0}

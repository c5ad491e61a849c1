"""Thirty updates beside TRL's DPOTrainer, over the same pairs in the same order."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from commands import dpo_train, metrics, run
from training_order import pairs_in_training_order

STEPS, BATCH, LEARNING_RATE = 30, 8, 5e-4
TRL_SIDE = Path(__file__).parents[2] / "benchmarks" / "train_trl.py"


def trl_curve(cache: Path, reference: Path, *, loss: str, beta: float) -> list[dict[str, float]]:
    interpreter = os.environ.get("DPO_CACHE_TRL_PYTHON")
    if not interpreter:
        pytest.skip("DPO_CACHE_TRL_PYTHON does not name an interpreter with TRL")
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    batches = pairs_in_training_order(cache, STEPS, global_batch_size=BATCH)
    assert all(len(batch) == BATCH for batch in batches), "TRL averages a short batch otherwise"
    job = {
        "model": str(reference),
        "dtype": "float32",
        "threads": 1,
        "pairs": [[row[name] for name in names] for batch in batches for row in batch],
        "batch_size": 4,
        "accumulation": BATCH // 4,
        "gradient_checkpointing": False,
        "steps": STEPS,
        "loss": loss,
        "beta": beta,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": STEPS // 10,
    }
    done = subprocess.run(
        [interpreter, TRL_SIDE],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["steps"]  # libraries print before
    return steps


@pytest.mark.parametrize(("ours", "theirs", "beta"), [("dpo", "sigmoid", 0.5), ("dpo_norm", "sigmoid_norm", 5.0)])
def test_thirty_updates_follow_the_curve_of_trl(
    shared_cache: Path, reference: Path, tmp_path: Path, ours: str, theirs: str, beta: float
) -> None:
    expected = trl_curve(shared_cache, reference, loss=theirs, beta=beta)
    objective = ("--loss", ours, "--beta", beta, "--learning-rate", LEARNING_RATE)
    batches = ("--global-batch-size", BATCH, "--max-steps", STEPS)
    run(dpo_train("--cache", shared_cache, "--output", tmp_path / "run", *objective, *batches))

    found = metrics(tmp_path / "run")
    assert len(found) == len(expected) == STEPS
    fields = {"learning_rate": "learning_rate", "train_loss": "loss", "grad_norm": "grad_norm"}
    if ours == "dpo":  # TRL's rewards of the length-normalised loss are those of the sums
        fields |= {f"rewards/{side}": f"rewards/{side}" for side in ("chosen", "rejected")}
        fields["rewards/margin"] = "rewards/margins"
    for our_step, their_step in zip(found, expected, strict=True):
        for our_field, their_field in fields.items():
            where = (our_step["training_step"], our_field)
            assert our_step[our_field] == pytest.approx(their_step[their_field], rel=1e-3, abs=1e-3), where
    assert found[-1]["train_loss"] < 0.6  # it has learned: thirty times ln 2 would prove nothing

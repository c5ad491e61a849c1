"""What ``--plan`` says of a run: everything that was resolved, and every warning that the run itself would print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_factory import fill_cache, make_cache, make_rows
from dpo_cache.stages.training.recipe import resolve_recipe
from dpo_cache.stages.training.train_config import TrainConfig
from dpo_cache.stages.training.train_plan import TrainPlan, plan_of


def planned(folder: Path, *, num_ranks: int = 1, **options: Any) -> TrainPlan:
    cache = make_cache(folder / "cache")
    mixture = fill_cache(cache, make_rows(20), shard_rows=20)
    held_out = fill_cache(cache, make_rows(24)[20:], shard_rows=20, name="held-out")
    config = TrainConfig(cache=folder / "cache", output=folder / "run", **options)
    recipe = resolve_recipe(config, cache, mixture, num_ranks=num_ranks)
    evaluation = {None: None, "train": mixture, "held-out": held_out}[config.eval_mixture]
    return plan_of(config, recipe, cache, mixture, evaluation)


def test_a_plan_names_policy_evaluation_memory_and_checkpoints(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "eval_mixture": "held-out",
        "eval_steps": 2,
        "global_batch_size": 4,
        "use_lora": True,
        "lora_rank": 8,
    }
    said = planned(tmp_path, **options, keep_last_n_checkpoints=1, zero_stage=1, keep_best="accuracy").summary()
    assert "made up, the cache's reference; LoRA adapter (rank 8, alpha 16, all-linear), saved as an adapter" in said
    assert "4 pairs of mixture held-out, before the first update, every 2 updates and after the last; the best" in said
    assert "ZeRO stage 1; micro-batches of at most" in said
    assert "activations are kept" in said
    assert "every 500 updates and at the end; the last one is kept\n" in f"{said}\n"
    said = planned(tmp_path, **options, model_saving_steps=100).summary()
    assert "the last 3 are kept; a model is saved every 100 updates" in said
    assert "warning" not in said


def test_a_plan_says_which_activations_are_kept(tmp_path: Path) -> None:
    assert "25% of the layers keep their activations" in planned(tmp_path, activation_memory_budget=0.25).summary()


def test_updates_are_counted_from_one_as_in_the_metrics(tmp_path: Path) -> None:
    plan = planned(tmp_path, max_steps=20, learning_rate=1e-6)
    assert "2 updates of warm-up; at update 1: 0, 2: 5e-07, 3: 1e-06, 20: 5.56e-08" in plan.summary()
    assert list(plan.to_json()["learning_rate_at_update"]) == ["1", "2", "3", "20"]


def test_one_of_a_kind_is_not_written_as_several(tmp_path: Path) -> None:
    said = planned(tmp_path, max_steps=10, eval_mixture="held-out", eval_steps=1, checkpointing_steps=1).summary()
    assert "on 1 rank\n" in said
    assert "1 update of warm-up" in said
    assert "before the first update, after every update and after the last" in said
    assert "2 ranks" in planned(tmp_path / "two", num_ranks=2).summary()


def test_a_plan_warns_as_the_run_would(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, beta=0.1, zero_stage=0, dtype="bfloat16", allow_numerics_mismatch=True, eval_mixture="train"
    )
    beta, gradients, shared = plan.to_json()["warnings"]
    assert beta.startswith("--beta 0.1 looks wrong for --loss dpo_norm")
    assert gradients.startswith("at --zero-stage 0 DeepSpeed accumulates bfloat16 gradients in bfloat16")
    assert shared.startswith("20 of 20 evaluation pairs are also trained on")
    assert all(f"\nwarning: {warning}" in plan.summary() for warning in (beta, gradients, shared))

"""The engine against plain PyTorch, at every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.scored_pair import ScoredPair
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.objective import resolve_objective
from dpo_cache.pipeline.training.policy_engine import parameter_groups, separate_step_counters
from dpo_cache.pipeline.training.preference_loss import preference_loss
from tiny_model_factory import tiny_model
from torch import nn
from training_factory import (
    LAYOUT,
    make_engine,
    plain_dpo_norm,
    random_pairs,
    scored_pair,
    tiny_policy,
    train_steps,
    trained_weights,
)

LEARNING_RATE = 2e-3
GLOBAL_BATCHES = [random_pairs(7, seed=step) for step in range(4)] + [random_pairs(1, seed=4)]
"""The last one is short: one rank of two has no pair at all."""


def train_at_all_stages(folder: str, dtype: str, splits: list[int]) -> list[Any]:
    results = []
    for stage in range(4):
        for micro_steps in splits:
            engine = make_engine(Path(folder), zero_stage=stage, num_ranks=2, dtype=dtype, max_grad_norm=0.5)
            figures = train_steps(engine, GLOBAL_BATCHES, learning_rate=LEARNING_RATE, micro_steps=micro_steps)
            adam_steps = {float(state["step"]) for state in engine.deepspeed.basic_optimizer.state.values()}
            results.append(
                (f"stage {stage}, {micro_steps} micro-steps", figures, trained_weights(engine), list(adam_steps))
            )
    return results


def _plain_training() -> tuple[list[tuple[float, float]], list[float]]:
    """Five steps of AdamW with clipping, no DeepSpeed, no scorer, no micro-batches."""
    model = tiny_policy()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    figures = []
    for pairs in GLOBAL_BATCHES:
        optimizer.zero_grad()
        loss = sum(plain_dpo_norm(model, row, beta=5.0) for row in pairs) / len(pairs)
        assert isinstance(loss, torch.Tensor)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        figures.append((float(loss.detach()), float(norm)))
    return figures, torch.nn.utils.parameters_to_vector(model.parameters()).tolist()


def test_every_zero_stage_on_two_ranks_trains_as_plain_pytorch(tmp_path: Path) -> None:
    expected, expected_weights = _plain_training()
    assert max(norm for _, norm in expected) > 0.5, "clipping must have something to do"
    for of_rank in run_ranks(train_at_all_stages, str(tmp_path), "float32", [1, 3], num_ranks=2):
        for name, figures, weights, _ in of_rank:
            for step, (found, wanted) in enumerate(zip(figures, expected, strict=True)):
                assert found == pytest.approx(wanted, rel=2e-5), f"{name}, step {step}"
            assert weights == pytest.approx(expected_weights, abs=2e-5), name


def gradients_of_two_updates(folder: str) -> list[list[int]]:
    """Where each gradient lies after an update, and whether DeepSpeed copied them together."""
    engine = make_engine(Path(folder), zero_stage=0, num_ranks=1)
    places = []
    for pairs in GLOBAL_BATCHES[:2]:
        train_steps(engine, [pairs], learning_rate=LEARNING_RATE, micro_steps=2)
        places.append([parameter.grad.data_ptr() for parameter in engine.parameters() if parameter.grad is not None])
        assert all(not parameter.grad.any() for parameter in engine.parameters() if parameter.grad is not None)
    assert not engine.deepspeed.enable_backward_allreduce
    return places


def test_no_bias_and_no_norm_is_decayed_though_it_may_be_a_matrix() -> None:
    models = [tiny_model("cohere", use_qk_norm=True), tiny_model("mixtral", model_type="gpt_oss", attention="eager")]
    matrices: set[str] = set()
    for model in models:
        decayed, others = ({id(one) for one in group["params"]} for group in parameter_groups(model, 0.1))
        assert not decayed & others
        for name, parameter in model.named_parameters():
            is_bias_or_norm = "bias" in name or "norm" in name
            if parameter.dim() > 1:
                assert (id(parameter) in others) == is_bias_or_norm, name
                matrices |= {name.removeprefix("model.layers.0.")} if is_bias_or_norm else set()
            else:
                assert id(parameter) in others, name
    assert {"self_attn.q_norm.weight", "mlp.experts.gate_up_proj_bias"} < matrices


def test_alone_on_a_cpu_gradients_stay_where_they_are_and_nothing_is_reduced(tmp_path: Path) -> None:
    """Freed and made anew among activations, they broke the heap into holes: 50 MB more with every update."""
    [[first, second]] = run_ranks(gradients_of_two_updates, str(tmp_path), num_ranks=1)
    assert first == second
    assert len(first) == len(list(tiny_policy().parameters()))


def test_bfloat16_trains_float32_masters_and_counts_adams_steps_right_at_every_stage(tmp_path: Path) -> None:
    """DeepSpeed's stage 0 has taken an empty step before the first, which makes early updates too small."""
    expected, _ = _plain_training()
    (of_rank, _) = run_ranks(train_at_all_stages, str(tmp_path), "bfloat16", [2], num_ranks=2)
    for name, figures, _, adam_steps in of_rank:
        # The early losses tell; at this learning rate later ones have blown rounding up to some percent.
        early = [loss for loss, _ in figures[:3]]
        assert early == pytest.approx([loss for loss, _ in expected[:3]], rel=0.05), name
        assert adam_steps == [5.0], name


def load_partitioned(folder: str) -> list[Any]:
    results = []
    for dtype in ("float32", "bfloat16"):
        loaded = make_engine(Path(folder), zero_stage=3, num_ranks=2, dtype=dtype, load_from=Path(folder) / "policy")
        partitioned = all(parameter.numel() == 0 for parameter in loaded.parameters())
        given = make_engine(Path(folder), zero_stage=3, num_ranks=2, dtype=dtype)
        recomputing = make_engine(Path(folder), zero_stage=3, num_ranks=2, dtype=dtype)
        policy: Any = recomputing.scorer.model
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        figures = [
            train_steps(engine, GLOBAL_BATCHES, learning_rate=LEARNING_RATE, micro_steps=1)
            for engine in (loaded, given, recomputing)
        ]
        results.append((partitioned, *figures))
    return results


def test_partitioning_while_reading_and_recomputing_activations_change_nothing(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path / "policy")
    for of_rank in run_ranks(load_partitioned, str(tmp_path), num_ranks=2):
        for partitioned, loaded, given, recomputing in of_rank:
            assert partitioned
            assert loaded == given
            assert recomputing == given


def _gradients(pairs: Sequence[ScoredPair], split: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Gradients in float64 when the pairs are split as given, losses divided by the number of all pairs."""
    scorer = PairScorer(tiny_policy().double())
    for members in split:
        micro_batch = collate([pairs[index] for index in members], LAYOUT)
        outcomes = preference_loss(resolve_objective("dpo_norm"), scorer(micro_batch.batch), micro_batch.reference)
        torch.autograd.backward(outcomes.objective_B.sum() / len(pairs))
    return [parameter.grad for parameter in scorer.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("split", [[[0], [1, 2, 3]], [[3, 1], [], [0, 2]], [[2], [0], [3], [1]]])
def test_any_split_into_micro_batches_gives_the_same_gradient(split: list[list[int]]) -> None:
    pairs = random_pairs(4)
    for found, wanted in zip(_gradients(pairs, split), _gradients(pairs, [[0, 1, 2, 3]]), strict=True):
        # Not 1e-15: RMSNorm of transformers computes in float32 whatever the model's dtype.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def stop_at_a_bad_batch(folder: str, stage: int, kind: str) -> list[Any]:
    engine = make_engine(Path(folder), zero_stage=stage, num_ranks=2)
    train_steps(engine, GLOBAL_BATCHES[:1], learning_rate=LEARNING_RATE, micro_steps=2)
    before = trained_weights(engine)
    good = GLOBAL_BATCHES[1][0]
    pairs = [good] * 4
    if kind == "loss":
        # Only the second micro-batch of rank 1 is bad; rank 0 must stop all the same.
        pairs[3] = scored_pair(good.pair, float("inf"), -1.0)
    else:
        final_norm: Any = engine.scorer.model.model.norm
        final_norm.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    try:
        train_steps(engine, [pairs], learning_rate=LEARNING_RATE, micro_steps=2)
    except DpoCacheError as error:
        return [
            str(error),
            trained_weights(engine) == before,
            json.loads((Path(folder) / "bad_batch.json").read_text()),
        ]
    return ["no error", False, {}]


def stop_at_bad_batches(folder: str) -> list[Any]:
    cases = [(0, "loss"), (0, "gradient"), (2, "gradient"), (3, "gradient")]
    return [(kind, *stop_at_a_bad_batch(folder, stage, kind)) for stage, kind in cases]


def test_a_loss_or_gradient_that_is_not_finite_stops_all_ranks_before_the_update(tmp_path: Path) -> None:
    key = GLOBAL_BATCHES[1][0].key.hex()
    for of_rank in run_ranks(stop_at_bad_batches, str(tmp_path), num_ranks=2):
        for kind, message, unchanged, record in of_rank:
            assert f"the {kind} of step 2 is not finite; the update was not applied" in message
            assert unchanged
            assert record["not_finite"] == kind
            assert {suspect["key"] for suspect in record["suspects"]} == {key}
            assert [suspect["rank"] for suspect in record["suspects"]] == ([1] if kind == "loss" else [0, 0, 1, 1])


def test_a_step_counter_from_a_checkpoint_lies_where_its_parameter_does_and_is_nobody_elses() -> None:
    """A fused AdamW on a GPU reads its counters there. The device without memory stands for one."""
    weights = [nn.Parameter(torch.zeros(2, device=device)) for device in ("meta", "cpu", "cpu")]
    optimizer = torch.optim.AdamW(weights)
    counter = torch.tensor(7.0)
    for weight in weights:
        optimizer.state[weight]["step"] = counter
    separate_step_counters(optimizer)
    elsewhere, first, second = (optimizer.state[weight]["step"] for weight in weights)
    assert elsewhere.device.type == "meta"
    first += 1
    assert [float(step) for step in (first, second, counter)] == [8, 7, 7]

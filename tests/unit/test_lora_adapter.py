"""LoRA policies: the reference at the start, plain PyTorch on the way, adapter and merged model at the end."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.checkpoint_folder import TrainerState, open_checkpoint
from dpo_cache.pipeline.training.checkpoints import convert_checkpoint, load_checkpoint, save_checkpoint
from dpo_cache.pipeline.training.lora_adapter import LoraSettings, add_lora
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.pipeline.training.tensor_headers import read_headers
from peft import PeftModel
from training_factory import (
    BATCHES,
    IDS,
    LAYOUT,
    LORA,
    RATE,
    assert_no_frozen_weight_in,
    export_adapter_plainly,
    export_plainly,
    make_engine,
    plain_training,
    policy_logits,
    tiny_policy,
    train_steps,
    trained_weights,
)
from transformers import AutoModelForCausalLM


def _train(engine: PolicyEngine, first: int, last: int) -> list[tuple[float, float]]:
    return train_steps(engine, BATCHES[first:last], learning_rate=RATE, micro_steps=2)


def train_adapters(folder: str, cases: list[tuple[int, bool]]) -> list[Any]:
    results = []
    for stage, checkpointing in cases:
        base, output = Path(folder) / "base", Path(folder) / f"{stage}_{checkpointing}"

        def engine(*, load_universal: bool = False) -> PolicyEngine:
            return make_engine(
                Path(folder),
                zero_stage=stage,  # noqa: B023  (called in this round only)
                num_ranks=dist.get_world_size(),
                weight_decay=0.0,
                load_from=base,  # noqa: B023
                lora=LORA,
                gradient_checkpointing=checkpointing,  # noqa: B023
                load_universal=load_universal,
            )

        straight = engine()
        at_start = straight.evaluate(collate(BATCHES[0], LAYOUT)).policy.chosen_logps_B.tolist()
        before = _train(straight, 0, 3)
        state = TrainerState(step=3, num_ranks=dist.get_world_size(), zero_stage=stage, run={})
        checkpoint = open_checkpoint(save_checkpoint(straight, output, state, keep_last=1))
        figures = before + _train(straight, 3, 5)
        resumed = engine()
        load_checkpoint(resumed, checkpoint)
        again = _train(resumed, 3, 5)
        export_adapter_plainly(straight, output / "adapter", base=base)
        export_plainly(straight, output / "merged", base=base)
        results.append(
            {
                "at_start": at_start,
                "figures": figures,
                "again": again,
                "weights": trained_weights(straight),
                "weights_again": trained_weights(resumed),
                "logits": policy_logits(straight, IDS),
            }
        )
    return results


def _plain_training(base: Path) -> tuple[list[tuple[float, float]], list[float]]:
    """Five steps of AdamW on the adapter in plain PyTorch and peft."""
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), LORA)
    figures = plain_training(model, BATCHES, learning_rate=RATE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return figures, [value for weight in trained for value in weight.detach().double().flatten().tolist()]


CASES = [(0, False), (2, True), (3, True)]


def test_an_adapter_trains_as_in_plain_pytorch_resumes_exactly_and_is_saved_whole_or_merged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    reference = tiny_policy()
    reference.save_pretrained(base)
    expected, expected_weights = _plain_training(base)
    assert expected[-1][0] != pytest.approx(expected[0][0], rel=1e-2)

    for of_rank in run_ranks(train_adapters, str(tmp_path), CASES, num_ranks=2):
        starts = [result["at_start"] for result in of_rank]
        assert starts == [starts[0]] * len(CASES)
        for case, result in zip(CASES, of_rank, strict=True):
            for found, wanted in zip(result["figures"], expected, strict=True):
                assert found == pytest.approx(wanted, rel=1e-4), case
            assert result["weights"] == pytest.approx(expected_weights, abs=1e-4), case
            assert result["again"] == result["figures"][3:], case
            assert result["weights_again"] == result["weights"], case
            _check_saved(tmp_path / f"{case[0]}_{case[1]}", base, reference, torch.tensor(result["logits"]))

    ((stage_2, stage_3),) = run_ranks(resume_on_one_rank, str(tmp_path), CASES[1:], num_ranks=1)
    for elsewhere in (stage_2, stage_3):
        for found, wanted in zip(elsewhere, expected[3:], strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)


def _check_saved(output: Path, base: Path, reference: Any, expected: torch.Tensor) -> None:
    files = {path.name for path in (output / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((output / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert {stat.S_IMODE(file.stat().st_mode) & 0o044 for file in (output / "adapter").iterdir()} == {0o044}
    assert read_headers(output / "merged") == read_headers(base)
    with torch.no_grad():
        untrained = reference(input_ids=IDS).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
        for model in (adapted, AutoModelForCausalLM.from_pretrained(output / "merged")):
            found = model(input_ids=IDS).logits
            torch.testing.assert_close(found.flatten(), expected, atol=2e-5, rtol=1e-4)
            assert (found - untrained).abs().max() > 0.1
    assert_no_frozen_weight_in(output / "step_3")


def resume_on_one_rank(folder: str, cases: list[tuple[int, bool]]) -> list[Any]:
    results = []
    for stage, checkpointing in cases:
        output = Path(folder) / f"{stage}_{checkpointing}"
        checkpoint = open_checkpoint(output / "step_3")
        convert_checkpoint(checkpoint, output / "universal")
        engine = make_engine(
            Path(folder),
            zero_stage=stage,
            num_ranks=1,
            weight_decay=0.0,
            load_from=Path(folder) / "base",
            lora=LORA,
            load_universal=True,
        )
        load_checkpoint(engine, checkpoint, converted=output / "universal")
        results.append(_train(engine, 3, 5))
    return results


def _names(*names: str) -> LoraSettings:
    return LoraSettings(rank=2, alpha=2.0, target_modules=names, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add_lora(tiny_policy(), _names("q_porj")), "--lora-target-modules q_porj cannot be used"),
        (lambda: add_lora(tiny_policy(), _names("q_proj", "lm_head")), "names the vocabulary head or an embedding"),
        (lambda: add_lora(tiny_policy(), _names("embed_tokens")), "names the vocabulary head or an embedding"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        make()


def test_the_adapter_starts_the_same_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = add_lora(tiny_policy(), LORA).state_dict()
    torch.rand(7)
    second = add_lora(tiny_policy(), LORA).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)

"""QLoRA policies: plain PyTorch, peft and bitsandbytes on the way; resumed, saved alone or merged into full weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_run import run_ranks
from dpo_cache.pipeline.training.checkpoint_folder import TrainerState, open_checkpoint
from dpo_cache.pipeline.training.checkpoints import load_checkpoint, save_checkpoint
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.pipeline.training.tensor_headers import read_headers
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_model import plainly_quantized
from safetensors.torch import load_file
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
)
from transformers import AutoModelForCausalLM

CASES = [(0, False), (2, True)]


def _plain_training(base: Path) -> list[tuple[float, float]]:
    """Losses and gradient norms of five steps of AdamW, with nothing of ours."""
    torch.manual_seed(LORA.seed)
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plainly_quantized(base), config)
    return plain_training(model, BATCHES, learning_rate=RATE)


def train_quantized(folder: str, cases: list[tuple[int, bool]]) -> list[Any]:
    base, results = Path(folder) / "base", []
    for stage, checkpointing in cases:
        output = Path(folder) / str(stage)

        def engine() -> PolicyEngine:
            return make_engine(
                Path(folder),
                zero_stage=stage,  # noqa: B023  (called in this round only)
                num_ranks=dist.get_world_size(),
                weight_decay=0.0,
                load_from=base,
                lora=LORA,
                quantization="nf4",
                gradient_checkpointing=checkpointing,  # noqa: B023
            )

        def train(engine: PolicyEngine, first: int, last: int) -> list[tuple[float, float]]:
            engine.evaluate(collate(BATCHES[0], LAYOUT))  # between updates, as in a run
            return train_steps(engine, BATCHES[first:last], learning_rate=RATE, micro_steps=2)

        straight = engine()
        figures = train(straight, 0, 3)
        state = TrainerState(step=3, num_ranks=dist.get_world_size(), zero_stage=stage, run={})
        checkpoint = open_checkpoint(save_checkpoint(straight, output, state, keep_last=1))
        figures += train(straight, 3, 5)
        resumed = engine()
        load_checkpoint(resumed, checkpoint)
        again = train(resumed, 3, 5)
        export_adapter_plainly(straight, output / "adapter", base=base)
        export_plainly(straight, output / "merged", base=base)
        results.append({"figures": figures, "again": again, "logits": policy_logits(straight, IDS)})
    return results


def test_an_adapter_on_quantized_weights_trains_as_in_plain_pytorch_resumes_exactly_and_is_saved(
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    tiny_policy().save_pretrained(base)
    expected = _plain_training(base)
    assert expected[-1][0] != pytest.approx(expected[0][0], rel=1e-2)
    for of_rank in run_ranks(train_quantized, str(tmp_path), CASES, num_ranks=2):
        for (stage, _), result in zip(CASES, of_rank, strict=True):
            for found, wanted in zip(result["figures"], expected, strict=True):
                assert found == pytest.approx(wanted, rel=1e-4), stage
            assert result["again"] == result["figures"][3:], stage
            _check_saved(tmp_path / str(stage), base, torch.tensor(result["logits"]))


def _check_saved(output: Path, base: Path, expected: torch.Tensor) -> None:
    """The adapter gives the policy back on the quantized base; merged, it is what it adds to the full one."""
    adapted = PeftModel.from_pretrained(plainly_quantized(base), output / "adapter").train()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits.flatten(), expected, atol=2e-5, rtol=1e-4)
    onto_full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
    wanted = onto_full.merge_and_unload().state_dict()
    merged = load_file(output / "merged/model.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)
    assert read_headers(output / "merged") == read_headers(base)
    assert "quantization_config" not in json.loads((output / "merged/config.json").read_text())
    assert_no_frozen_weight_in(output / "step_3")

"""TRL's side of ``benchmarks/build.py``: its reference pass over given token ids, timed on request.

Runs in an environment of its own (TRL and torch, nothing of this project). Reads one JSON object with the model's
folder and the pairs, then one batch size a line; answers each with seconds and values.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    job = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # TRL prints
    torch.set_num_threads(job["threads"])
    pairs = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)) for ids in job["pairs"]]
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(job["model"], job["dtype"], output)
        reference_pass(trainer, pairs[:2], 2)
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            seconds, values = reference_pass(trainer, pairs, int(line))
            print(json.dumps({"seconds": seconds, "values": values}), file=answers, flush=True)


def make_trainer(model_folder: str, dtype: str, output: str) -> DPOTrainer:
    """A trainer whose own dataset is a stand-in: the pairs go to its collator and its reference pass directly."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return DPOTrainer(
        model,
        args=DPOConfig(output_dir=output, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


def reference_pass(
    trainer: DPOTrainer, pairs: list[dict[str, Any]], batch_size: int
) -> tuple[float, list[tuple[float, float]]]:
    """What ``precompute_ref_log_probs`` does between its data loader and its cache file."""
    model = (trainer.ref_model or trainer.model).eval()
    values: list[tuple[float, float]] = []
    started = time.perf_counter()
    for start in range(0, len(pairs), batch_size):
        batch = trainer.data_collator(pairs[start : start + batch_size])
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        values += zip(chosen.tolist(), rejected.tolist(), strict=True)
    return time.perf_counter() - started, values


if __name__ == "__main__":
    main()

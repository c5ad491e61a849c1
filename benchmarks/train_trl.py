"""TRL's side of a comparison in training: its DPOTrainer over given token ids and given reference values.

Runs in an environment of its own (TRL and torch, nothing of this project). Reads one JSON object (:func:`main` lists
its fields), trains, and prints one with a record a step and the process's memory.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Fields of the job: model, dtype, threads, pairs (prompt, chosen, rejected ids and the reference's two sums, in
    the order of training), batch_size and accumulation (in pairs), gradient_checkpointing, steps, loss, beta,
    learning_rate, warmup_steps."""
    job = json.loads(sys.stdin.readline())
    answer, sys.stdout = sys.stdout, sys.stderr  # TRL prints
    torch.set_num_threads(job["threads"])
    steps = StepRecords()
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(job, output)
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.add_callback(steps)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"steps": steps.records, "loaded_kib": loaded, "peak_kib": peak}), file=answer, flush=True)


def make_trainer(job: dict[str, Any], output: str) -> DPOTrainer:
    """A trainer with precomputed references whose order of pairs is the one given."""
    folder = job["model"]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"),
        args=DPOConfig(
            output_dir=output,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=job["gradient_checkpointing"],
            precompute_ref_log_probs=True,
            per_device_train_batch_size=job["batch_size"],
            gradient_accumulation_steps=job["accumulation"],
            max_steps=job["steps"],
            loss_type=job["loss"],
            beta=job["beta"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=job["warmup_steps"],
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        # The pairs take its place below, tokenised as the other side has them.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    trainer.train_dataset = Dataset.from_list([dict(zip(names, pair, strict=True)) for pair in job["pairs"]])
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


class StepRecords(TrainerCallback):  # type: ignore[misc]
    """What TRL logs about each step, and how long the step took."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            numbers = {name: float(value) for name, value in logs.items() if name != "epoch"}
            self.records.append({"step": state.global_step, "seconds": self._seconds, **numbers})


if __name__ == "__main__":
    main()

"""TRL's side of ``benchmarks/gpu.py``: its reference pass and its DPOTrainer, over given token ids.

Runs in an environment of its own or in ours. Reads one JSON object (:func:`main` lists its fields) and prints one with
the seconds of each round and the peak memory. The model has random weights of the given shape, in bfloat16, and an
adapter: TRL then keeps no second model, and scores with the adapter switched off.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

NAMES = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


def main() -> None:
    """Fields of the job: shape (of LlamaConfig), lora_rank, pairs (prompt, chosen, rejected ids and the reference's
    two sums), what (score or train), batch_size and accumulation (in pairs), repeats."""
    job = json.loads(sys.stdin.readline())
    answer, sys.stdout = sys.stdout, sys.stderr  # TRL prints
    dpo_trainer.hash_module = lambda _: "not needed"  # it names a cache of values, by reading all weights
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(job, output)
        rounds = scoring_rounds(trainer, job) if job["what"] == "score" else training_rounds(trainer)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"version": version("trl"), "seconds": rounds, "memory_bytes": memory}), file=answer, flush=True)


def make_trainer(job: dict[str, Any], output: str) -> DPOTrainer:
    """A trainer whose own dataset is a stand-in: the pairs take its place, tokenised as the other side has them."""
    config = LlamaConfig(**job["shape"], max_position_embeddings=8192, rope_theta=500_000.0)
    config._attn_implementation = "sdpa"
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=output,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=job["batch_size"],
            gradient_accumulation_steps=job["accumulation"],
            max_steps=1 + job["repeats"],
            loss_type="sigmoid_norm",
            beta=5.0,
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "a"}]),
        processing_class=two_letter_tokenizer(),
        peft_config=LoraConfig(r=job["lora_rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train_dataset = Dataset.from_list([dict(zip(NAMES, pair, strict=True)) for pair in job["pairs"]])
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def two_letter_tokenizer() -> PreTrainedTokenizerFast:
    """Enough for the stand-in; the pairs come as token ids."""
    vocabulary = {"a": 0, "b": 1, "<end>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def scoring_rounds(trainer: DPOTrainer, job: dict[str, Any]) -> list[float]:
    """Seconds of its reference pass over all pairs, after one that warms up."""
    model, rows, batch_size = trainer.model.eval(), list(trainer.train_dataset), job["batch_size"]

    def reference_pass() -> None:
        for start in range(0, len(rows), batch_size):
            batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + batch_size]))
            for logps in trainer.compute_ref_log_probs(model, batch):
                logps.cpu()

    return [timed(reference_pass) for _ in range(1 + job["repeats"])][1:]


def timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def training_rounds(trainer: DPOTrainer) -> list[float]:
    """Seconds of its updates, the first one left out."""
    steps = StepSeconds()
    trainer.add_callback(steps)
    trainer.train()
    return steps.seconds[1:]


class StepSeconds(TrainerCallback):  # type: ignore[misc]
    """How long each update took, its batches' collation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._started)
        self._started = now


if __name__ == "__main__":
    main()

"""Runs a trainer of TRL as a page of the documentation does: a program for an interpreter that has TRL.

Reads the page's code on stdin and runs it in the current folder, which holds what the code names. Prints one JSON
object: the logged losses, and what was loaded and run.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import transformers
import trl
from transformers.models.llama.modeling_llama import LlamaModel

STEPS = 2


def main() -> None:
    """Run the code with a small batch on the CPU, in full precision."""
    answers, sys.stdout = sys.stdout, sys.stderr  # TRL prints
    counts = {"loaded": 0, "forwards": 0}
    _count(transformers.PreTrainedModel, "from_pretrained", counts, "loaded")
    _count(LlamaModel, "forward", counts, "forwards")
    small: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
    }
    small |= {"max_steps": STEPS, "logging_steps": 1, "report_to": [], "save_strategy": "no", "learning_rate": 1e-3}
    trl.DPOConfig = functools.partial(trl.DPOConfig, **small)
    names: dict[str, Any] = {}
    exec(compile(sys.stdin.read(), "page", "exec"), names)
    trainer = names["trainer"]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(json.dumps({"losses": losses, "has_reference": trainer.ref_model is not None, **counts}), file=answers)


def _count(owner: Any, name: str, counts: dict[str, int], counter: str) -> None:
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[counter] += 1
        return function(*args, **kwargs)

    setattr(owner, name, classmethod(counting) if isinstance(original, classmethod) else counting)


if __name__ == "__main__":
    main()

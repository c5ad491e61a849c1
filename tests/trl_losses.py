"""Losses of TRL's DPOTrainer on given log-probabilities: a program for an interpreter that has TRL.

Reads one JSON object and prints one JSON list. The trainer's loss function is called as it is, on a stand-in for the
model that returns the given log-probabilities, so nothing of its equations is repeated here.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    print(json.dumps([_answer(request["pairs"], case) for case in request["cases"]]))


def _answer(pairs: list[Any], case: dict[str, Any]) -> dict[str, Any]:
    sequences = [pair[side] for side in (0, 1) for pair in pairs]  # all chosen ones, then all rejected ones
    longest = max(len(policy) for policy, _ in sequences)
    policy, reference, mask = (torch.zeros(len(sequences), longest) for _ in range(3))
    for row, (ours, theirs) in enumerate(sequences):
        policy[row, : len(ours)] = torch.tensor(ours)
        reference[row, : len(theirs)] = torch.tensor(theirs)
        mask[row, : len(ours)] = 1
    policy.requires_grad_()
    trainer = _trainer(case, reference * mask)
    inputs = {
        "input_ids": torch.zeros(len(sequences), longest + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(sequences), longest + 1),
        # One unscored token in front: the log-probabilities are of the tokens after it.
        "completion_mask": torch.cat([torch.zeros(len(sequences), 1), mask], dim=1).long(),
    }
    loss = DPOTrainer._compute_loss(trainer, _model(policy * mask), inputs, False)
    loss.backward()
    assert policy.grad is not None
    chosen, rejected = policy.grad.chunk(2)
    sides = [
        side[row, : len(pairs[row][number][0])].tolist()
        for row in range(len(pairs))
        for number, side in enumerate((chosen, rejected))
    ]
    rewards = [trainer._metrics["train"][f"rewards/{side}"][0] for side in ("chosen", "rejected")]
    return {"loss": loss.item(), "gradients": [value for side in sides for value in side], "rewards": rewards}


def _model(log_probs: torch.Tensor) -> Any:
    """What TRL's model call gives back, as far as the loss reads it."""
    blank = torch.zeros_like(log_probs)
    output = SimpleNamespace(
        log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool(), log_sum_sq_probs=blank
    )
    return lambda **_: output


def _trainer(case: dict[str, Any], reference: torch.Tensor) -> Any:
    """The trainer's attributes that its loss reads."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=_model(reference),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        use_weighting=False,
        loss_types=case["loss_type"],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{name: value for name, value in case.items() if name != "loss_type"},
    )


if __name__ == "__main__":
    main()

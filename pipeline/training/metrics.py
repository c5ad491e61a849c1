"""What a log line says: sums and counts on the device, brought together by one reduction a line.

Nothing is averaged before everything has been added up, so the numbers do not depend on how the pairs were split
into ranks and micro-batches.

Shape suffix: B pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..scoring.device_limits import peak_flops_per_second, peak_memory_bytes
from ..scoring.flops import ModelCost, forward_flops
from .micro_batch import ScoredMicroBatch
from .objective import Objective

_COUNTS = ("pairs", "tokens", "attended", "scored")
"""Known without asking the device."""
_SUMS = (
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_per_token",
    "rejected_per_token",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_rewards",
    "rejected_rewards",
    "right",
    "aux_loss",
)


class PairMetrics:
    """Sums over the pairs since the last log line.

    Args:
        objective: Decides the unit of ``logps/*`` and ``rewards/*``, and whether there are rewards at all.
        device: Where the sums are kept, so that adding to them never waits for the device.
        tie_margin: A difference of the two rewards below this, in nats per token, is noise: a tie, which counts half
            in the accuracy.
        cost: Of the model, for ``perf/mfu``; None leaves it out. A backward pass counts twice a forward pass; what is
            computed again (checkpointed activations, the head's logits) does not count.
        prefix: Put before every name; ``eval/`` for evaluation.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        device: torch.device,
        tie_margin: float,
        cost: ModelCost | None = None,
        prefix: str = "",
    ) -> None:
        self._objective = objective
        self._device = device
        self._tie_margin = tie_margin
        self._cost = cost
        self._peak_flops = peak_flops_per_second(device)
        self._prefix = prefix
        self._has_aux_loss = False
        self._restart()

    def _restart(self) -> None:
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self._device)
        self._since = time.perf_counter()

    def add(self, scored: ScoredMicroBatch) -> None:
        """Add one micro-batch; no communication, no waiting."""
        outcomes, policy, batch = scored.outcomes, scored.policy, scored.micro_batch.batch
        zero = self._sums.new_zeros(())
        right = chosen_rewards = rejected_rewards = aux_loss = zero
        if outcomes.chosen_rewards_B is not None and outcomes.rejected_rewards_B is not None:
            chosen_rewards, rejected_rewards = (
                outcomes.chosen_rewards_B.sum(),
                outcomes.rejected_rewards_B.sum(),
            )
            right = self._right(
                outcomes.chosen_rewards_B, outcomes.rejected_rewards_B, outcomes.margin_per_token_B
            ).sum()
        if policy.aux_loss is not None:
            self._has_aux_loss = True
            aux_loss = policy.aux_loss * scored.micro_batch.num_pairs
        counted = (scored.micro_batch.num_pairs, batch.num_tokens, batch.num_attended, batch.num_scored)
        for name, count in zip(_COUNTS, counted, strict=True):
            self._counts[name] += count
        self._sums += torch.stack(
            [
                outcomes.objective_B.sum(),
                outcomes.chosen_logps_B.sum(),
                outcomes.rejected_logps_B.sum(),
                (policy.chosen_logps_B / policy.chosen_tokens_B).sum(),
                (policy.rejected_logps_B / policy.rejected_tokens_B).sum(),
                policy.chosen_tokens_B.double().sum(),
                policy.rejected_tokens_B.double().sum(),
                chosen_rewards,
                rejected_rewards,
                right,
                aux_loss.double(),
            ]
        )

    def _right(self, chosen_rewards_B: Tensor, rejected_rewards_B: Tensor, margin_per_token_B: Tensor) -> Tensor:
        """1 where chosen has the higher reward, 0 where rejected has, 1/2 for a tie; no number for a margin that is
        none."""
        tie_B = (margin_per_token_B.abs() < self._tie_margin) | (chosen_rewards_B == rejected_rewards_B)
        right_B = torch.where(tie_B, 0.5, (chosen_rewards_B > rejected_rewards_B).double())
        return torch.where((chosen_rewards_B - rejected_rewards_B).isnan(), torch.nan, right_B)

    def unlogged_sums(self) -> dict[str, float]:
        """The sums since the last line, over all ranks, and the seconds; nothing is reset. All ranks call this."""
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64, device=self._device)
        reduced = torch.cat([self._sums, counts])
        dist.all_reduce(reduced)
        sums = dict(zip((*_SUMS, *_COUNTS), reduced.tolist(), strict=True))
        return {**sums, "seconds": time.perf_counter() - self._since}

    def restore_sums(self, unlogged: Mapping[str, float]) -> None:
        """Add the sums and the seconds of a run that stopped between two lines; called on one rank only."""
        self._sums += torch.tensor([unlogged[name] for name in _SUMS], dtype=torch.float64, device=self._device)
        for name in _COUNTS:
            self._counts[name] += int(unlogged[name])
        self._since -= unlogged["seconds"]

    def reduce(self) -> dict[str, float]:
        """The fields of a line over all pairs since the last one, on all ranks alike; then start over.

        One reduction. A maximum travels in it too: each rank puts its figure in a place of its own.
        """
        num_ranks = dist.get_world_size()
        memory = [0] * num_ranks
        memory[dist.get_rank()] = peak_memory_bytes(self._device)
        known = torch.tensor([*self._counts.values(), *memory], dtype=torch.float64, device=self._device)
        reduced = torch.cat([self._sums, known])
        dist.all_reduce(reduced)
        names = (*_SUMS, *_COUNTS)
        numbers = reduced.tolist()  # waits for the device, whose work the time is of
        seconds = time.perf_counter() - self._since
        totals = dict(zip(names, numbers[: len(names)], strict=True))
        fields = self._learning(totals) | self._speed(totals, seconds, num_ranks)
        fields["perf/peak_memory_gib"] = max(numbers[len(names) :]) / 2**30
        self._restart()
        return {self._prefix + name: value for name, value in fields.items()}

    def _learning(self, totals: dict[str, float]) -> dict[str, float]:
        pairs = max(totals["pairs"], 1.0)
        fields = {
            # Lines of a step and of an evaluation are told apart by this name.
            "loss" if self._prefix else "train_loss": totals["loss"] / pairs,
            "logps/chosen": totals["chosen_logps"] / pairs,
            "logps/rejected": totals["rejected_logps"] / pairs,
            "logps/chosen_per_token": totals["chosen_per_token"] / pairs,
            "logps/rejected_per_token": totals["rejected_per_token"] / pairs,
            "tokens/chosen": totals["chosen_tokens"] / pairs,
            "tokens/rejected": totals["rejected_tokens"] / pairs,
        }
        if self._objective.uses_reference:
            chosen, rejected = totals["chosen_rewards"] / pairs, totals["rejected_rewards"] / pairs
            fields |= {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/average": (chosen + rejected) / 2,
                "rewards/accuracy": totals["right"] / pairs,
                "rewards/margin": chosen - rejected,
            }
        if self._has_aux_loss:
            fields["aux_loss"] = totals["aux_loss"] / pairs
        return fields

    def _speed(self, totals: dict[str, float], seconds: float, num_ranks: int) -> dict[str, float]:
        fields = {
            "perf/tokens_per_second": totals["tokens"] / seconds,
            "perf/pairs_per_second": totals["pairs"] / seconds,
        }
        if self._cost is not None and self._peak_flops is not None:
            forward = forward_flops(
                self._cost,
                num_tokens=int(totals["tokens"]),
                num_attended=int(totals["attended"]),
                num_scored=int(totals["scored"]),
            )
            done = forward if self._prefix else (1 + self._cost.backward_forwards) * forward
            fields["perf/mfu"] = done / (seconds * self._peak_flops * num_ranks)
        return fields


def step_line(
    metrics: PairMetrics, *, training_step: int, learning_rate: float, epoch: float, grad_norm: float
) -> dict[str, float]:
    """The line of a logged step, in the order people read it.

    Args:
        metrics: What was added since the last line; reduced here, so all ranks call this.
        training_step: Updates done, counted from 1.
        learning_rate: The rate this update used.
        epoch: Epochs done, as a fraction.
        grad_norm: Of this update, before clipping.
    """
    line: dict[str, float] = {"training_step": training_step, "learning_rate": learning_rate, "epoch": epoch}
    line |= metrics.reduce()
    line["grad_norm"] = grad_norm
    return line

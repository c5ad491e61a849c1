"""The policy in a DeepSpeed engine: forward and backward passes of micro-batches, then the update.

Two things differ from a common DeepSpeed loop. The number of micro-steps varies from update to update, so we say which
backward pass is the last instead of letting DeepSpeed count. Also, the objective is divided by the number of pairs of
the whole global batch, so DeepSpeed's average over ranks has to be undone: it is given the objective times the number
of ranks.

Shape suffix: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from ...errors import DpoCacheError
from ..scoring.pair_scorer import PairScorer
from ..scoring.scoring_batch import PairLogps
from .bad_batch import report_bad_batch
from .micro_batch import MicroBatch, ScoredMicroBatch
from .objective import Objective
from .preference_loss import PairOutcomes, preference_loss
from .sorted_partners import sorted_partners


class PolicyEngine:
    """The policy, its optimizer and its partitioning, at any ZeRO stage.

    ``torch.distributed`` has to be initialised. Every method but the properties is collective: all ranks call it, in
    the same order.

    Args:
        scorer: The policy. May have been partitioned while it was loaded (``deepspeed.zero.Init``).
        config: From :func:`~.deepspeed_config.deepspeed_config`.
        objective: What to minimise.
        weight_decay: AdamW's, on matrices; biases and norms are not decayed.
        adam_betas, adam_epsilon: AdamW's.
        bad_batch_path: Where the keys of a micro-batch go whose objective or gradient is not finite.
        load_balancing_weight: Weight of the mixture-of-experts balancing loss, where the scorer returns it.
    """

    def __init__(
        self,
        scorer: PairScorer,
        *,
        config: dict[str, Any],
        objective: Objective,
        weight_decay: float,
        bad_batch_path: Path,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_epsilon: float = 1e-8,
        load_balancing_weight: float = 0.0,
    ) -> None:
        self.scorer = scorer  # the module itself, without DeepSpeed around it
        self.objective = objective
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._bad_batch_path = bad_batch_path
        self._load_balancing_weight = load_balancing_weight
        self.zero_stage: int = config["zero_optimization"]["stage"]
        # Fused on the host too: as quick as DeepSpeed's own kernel for offloaded state, which has to be compiled first.
        # The learning rate is set before every update.
        groups = parameter_groups(scorer, weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=adam_betas, eps=adam_epsilon, fused=True)
        self.deepspeed: Any = deepspeed.initialize(model=scorer, optimizer=self._optimizer, config=config)[0]
        self.device: torch.device = torch.device(self.deepspeed.device)
        if self.zero_stage == 0:
            self._correct_stage_zero()
        self._keeps_gradients = self.zero_stage == 0 and self.device.type == "cpu" and not config.get("bf16")
        if self._keeps_gradients:
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter)
        self._assert_fp32_masters()
        self.deepspeed.train()
        # One entry for each micro-step since the last update.
        self._objective_is_finite: list[Tensor] = []
        self._keys: list[tuple[bytes, ...]] = []

    @property
    def updates_done(self) -> int:
        """Updates since the start of the run, those before a resume included."""
        return int(self.deepspeed.global_steps)

    def micro_step(self, micro_batch: MicroBatch, *, num_pairs: int, is_last: bool) -> ScoredMicroBatch:
        """Forward and backward of one micro-batch.

        Args:
            micro_batch: On this engine's device. Without pairs it weighs nothing and still joins the collectives.
            num_pairs: Pairs of the whole global batch, over all ranks and micro-steps.
            is_last: The last micro-step before :meth:`apply_update`, on every rank alike.
        """
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        policy: PairLogps = self.deepspeed(micro_batch.batch)
        outcomes = preference_loss(self.objective, policy, micro_batch.reference, micro_batch.partners)
        objective = outcomes.objective_B.sum()
        if policy.aux_loss is not None:
            objective = objective + self._load_balancing_weight * policy.aux_loss * micro_batch.num_pairs
        objective = objective / num_pairs
        self._objective_is_finite.append(torch.isfinite(objective.detach()))
        self._keys.append(micro_batch.keys)
        self.deepspeed.backward(objective * self.num_ranks, scale_wrt_gas=False)
        return _scored(micro_batch, policy, outcomes)

    def apply_update(self, learning_rate: float) -> float:
        """Clip and apply the gradients of the micro-steps since the last update.

        Returns:
            The norm of the whole gradient before clipping.

        Raises:
            DpoCacheError: The objective or its gradient is not finite, on all ranks alike. Nothing has been applied;
                the keys are in the bad-batch file.
        """
        training_step = self.updates_done + 1
        self._refuse_nonfinite_objective(training_step)
        for group in self._groups():
            group["lr"] = learning_rate
        if self.zero_stage == 0:
            norm = self._gradient_norm()
            if math.isfinite(norm):
                self._step()
        else:
            self._step()  # DeepSpeed computes the norm in here, and applies nothing if it is not finite
            norm = float(self.deepspeed.get_global_grad_norm())
        if not math.isfinite(norm) or not self.deepspeed.was_step_applied():
            suspects = [key for keys in self._keys for key in keys]
            report_bad_batch(self._bad_batch_path, reason="gradient", training_step=training_step, keys=suspects)
        self._objective_is_finite.clear()
        self._keys.clear()
        return norm

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> ScoredMicroBatch:
        """Forward pass of one micro-batch, for evaluation; every rank makes the same number of these calls."""
        policy = self._score(micro_batch)
        outcomes = preference_loss(self.objective, policy, micro_batch.reference, micro_batch.partners)
        return _scored(micro_batch, policy, outcomes)

    @torch.no_grad()
    def with_partners(self, micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
        """Give all of this rank's micro-batches of a global batch the partners that a sorting loss compares with.

        A forward pass of its own over the global batch, before the one that carries gradients.
        """
        scored = [(micro_batch, self._score(micro_batch)) for micro_batch in micro_batches]
        partners = sorted_partners(self.objective, scored)
        return [replace(micro_batch, partners=found) for (micro_batch, _), found in zip(scored, partners, strict=True)]

    def load_state(self, folder: Path, *, tag: str) -> None:
        """Load what DeepSpeed saved; to be called right after this engine was made.

        Raises:
            DpoCacheError: There is nothing to load.
        """
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self._groups()]
        frozen = any(not parameter.requires_grad for parameter in self.parameters())
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=not frozen)
        if loaded is None:
            raise DpoCacheError(f"DeepSpeed found no state in {folder / tag}")
        # From a converted state, stage 3 gives all groups the settings of the first: a weight decay of 0 is lost.
        for group, before in zip(self._groups(), settings, strict=True):
            group.update(before)
        separate_step_counters(self._optimizer)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The policy's parameters; under ZeRO-3 their shape is ``ds_shape``."""
        return self.scorer.parameters()

    def master_weights(self) -> list[Tensor]:
        """The float32 weights that the optimizer updates on this rank, as it keeps them: whole, flat or in parts."""
        if self.zero_stage == 3:
            partitions: list[Tensor] = self.deepspeed.optimizer.fp32_partitioned_groups_flat
            return partitions
        return [weight for group in self._groups() for weight in group["params"]]

    def master_weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole float32 weight that the optimizer keeps behind a trained bfloat16 parameter; collective."""
        if self.zero_stage == 0:
            optimizer = self.deepspeed.optimizer
            computed = [weight for group in optimizer.fp16_groups for weight in group]
            masters: list[Tensor] = [weight for group in optimizer.fp32_groups for weight in group]
            return next(master for weight, master in zip(computed, masters, strict=True) if weight is parameter)
        master: Tensor | None = safe_get_full_fp32_param(parameter)
        assert master is not None
        return master

    def _correct_stage_zero(self) -> None:
        """Undo what DeepSpeed sets up at stage 0 and should not."""
        # Its bf16 wrapper takes an empty step to allocate AdamW's state, which leaves the step counter, hence the bias
        # correction, one ahead.
        self._optimizer.state.clear()
        # Alone there is nothing to reduce, and DeepSpeed would copy all gradients into one buffer for it.
        self.deepspeed.enable_backward_allreduce = self.num_ranks > 1

    def _assert_fp32_masters(self) -> None:
        """At learning rates of preference tuning, most updates are smaller than a bf16 weight's last bit."""
        masters = self.master_weights()
        assert masters
        assert all(weight.dtype == torch.float32 for weight in masters), "master weights are not float32"

    def _refuse_nonfinite_objective(self, training_step: int) -> None:
        """One reduction an update: a rank that stopped alone would leave the others waiting."""
        finite = torch.stack(self._objective_is_finite)
        worst = finite.all().to(torch.int32)
        dist.all_reduce(worst, op=dist.ReduceOp.MIN)
        if worst.item():
            return
        suspects = [
            key for is_finite, keys in zip(finite.tolist(), self._keys, strict=True) if not is_finite for key in keys
        ]
        report_bad_batch(self._bad_batch_path, reason="loss", training_step=training_step, keys=suspects)

    def _gradient_norm(self) -> float:
        """Norm of the gradient that all ranks hold after the last backward pass of stage 0."""
        norms = [
            torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)  # of bf16 gradients too
            for parameter in self.parameters()
            if parameter.grad is not None
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _step(self) -> None:
        """DeepSpeed's update. On a CPU at stage 0 the gradients keep their memory, which DeepSpeed would free.

        Allocated again among activations, whose sizes change with every micro-batch, they would fragment glibc's heap.
        """
        kept = [(parameter, parameter.grad) for parameter in self._trained()] if self._keeps_gradients else []
        self.deepspeed.step()
        for parameter, gradient in kept:
            assert gradient is not None
            parameter.grad = gradient.zero_()

    def _score(self, micro_batch: MicroBatch) -> PairLogps:
        self.deepspeed.eval()
        policy: PairLogps = self.deepspeed(micro_batch.batch)
        self.deepspeed.train()
        return policy

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups


def separate_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a step counter of its own, on its own device, where a fused AdamW reads it.

    From a converted state DeepSpeed puts the counters in host memory whatever the device, which a kernel on a GPU
    cannot read. At stage 3 all parameters share one, which then counts the update of every one of them.
    """
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(device=parameter.device, dtype=torch.float32, copy=True)


def _scored(micro_batch: MicroBatch, policy: PairLogps, outcomes: PairOutcomes) -> ScoredMicroBatch:
    detached: Any = (None if value is None else value.detach() for value in policy)
    return ScoredMicroBatch(micro_batch=micro_batch, policy=PairLogps(*detached), outcomes=outcomes.detached())


def parameter_groups(scorer: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, in AdamW's groups: matrices, which are decayed, and biases, norms and the like, which are not.

    Raises:
        DpoCacheError: Nothing of it is trained.
    """
    trainable = {name: parameter for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise DpoCacheError("the policy has no parameter to train")
    if not weight_decay:
        return [{"params": list(trainable.values()), "weight_decay": 0.0}]
    decayed = [parameter for name, parameter in trainable.items() if _is_decayed(name, parameter)]
    others = [parameter for name, parameter in trainable.items() if not _is_decayed(name, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is more than a bias or a norm; under ZeRO-3 a parameter is flat and its shape set aside.

    The shape alone does not tell: experts keep their biases in one matrix, and so do norms that differ from head to
    head.
    """
    module, _, own_name = name.rpartition(".")
    is_bias_or_norm = own_name.endswith("bias") or module.endswith("norm")
    return not is_bias_or_norm and len(getattr(parameter, "ds_shape", parameter.shape)) > 1

"""The loop of stage two, in the order of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.pair_stream import PairStream
from ...pipeline.scoring.flops import ModelCost
from ...pipeline.scoring.scoring_batch import Layout
from ...pipeline.training.dealing import deal, deal_padded
from ...pipeline.training.eval_margins import EvalMargins
from ...pipeline.training.global_batches import GlobalBatch
from ...pipeline.training.metrics import PairMetrics, step_line
from ...pipeline.training.micro_batch import MicroBatch, collate
from ...pipeline.training.policy_engine import PolicyEngine
from ...pipeline.training.step_zero import StepZeroFigures, StepZeroProof
from ..processes.background import ReadAhead
from .recipe import Recipe, global_batches


class MicroBatches:
    """Pairs of a mixture, dealt to the ranks and laid out for the model.

    Args:
        cache: The cache.
        mixture: A mixture of it.
        layout: How pairs lie in rows.
        engine: Tells which rank of how many this is, and its device.
        tokens_per_microbatch: Token budget of one micro-batch.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        mixture: Mixture,
        *,
        layout: Layout,
        engine: PolicyEngine,
        tokens_per_microbatch: int,
    ) -> None:
        self.mixture = mixture
        is_padded = layout is Layout.PADDED
        self._deal = deal_padded if is_padded else deal
        self._lengths = mixture.longest_sequence_lengths() if is_padded else mixture.shared_prefix_lengths()
        self._stream = PairStream(cache, mixture)
        self._layout = layout
        self._rank, self._num_ranks, self._device = engine.rank, engine.num_ranks, engine.device
        self._tokens_per_microbatch = tokens_per_microbatch

    def of(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """This rank's share of a global batch: rows of each micro-batch, as many of them as on any other rank."""
        dealt = self._deal(
            rows,
            self._lengths[rows],
            num_ranks=self._num_ranks,
            tokens_per_microbatch=self._tokens_per_microbatch,
        )
        return dealt[self._rank]

    def read(self, shares: Sequence[npt.NDArray[np.int64]]) -> Iterator[MicroBatch]:
        """Read each share of rows and lay it out on the device, the next one while the last one is worked on.

        A share without rows gives an empty batch, with which the rank still joins the collectives.
        """
        with ReadAhead(map(self._laid_out, shares)) as micro_batches:
            for micro_batch in micro_batches:
                yield micro_batch.to(self._device, non_blocking=True)

    def _laid_out(self, rows: npt.NDArray[np.int64]) -> MicroBatch:
        micro_batch = collate(self._stream.read(rows), self._layout)
        return micro_batch.pin_memory() if self._device.type == "cuda" else micro_batch

    def tokens(self, rows: npt.NDArray[np.int64]) -> int:
        """What these pairs cost, in tokens: prompt and both responses, or if padded, prompt and longer response."""
        return int(self._lengths[rows].sum())

    def longest(self, rows: npt.NDArray[np.int64]) -> int:
        """Tokens of the longest of these rows."""
        return int(self._lengths[rows].max())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """The result of an evaluation on the held-out pairs.

    Attributes:
        line: The fields to log.
        margins: Reward margin of each pair in the mixture's order; None for an objective without rewards.
    """

    line: dict[str, float]
    margins: npt.NDArray[np.float64] | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Dealt:
    """One micro-batch of this rank, the rows of the mixture it holds, and whether it is the last of its batch."""

    rows: npt.NDArray[np.int64]
    micro_batch: MicroBatch
    is_last: bool


class TrainingLoop:
    """Updates and evaluations of one run.

    Args:
        engine: The policy.
        recipe: The resolved numbers.
        training: The pairs to train on.
        evaluation: Held-out pairs.
    """

    def __init__(
        self, engine: PolicyEngine, recipe: Recipe, training: MicroBatches, evaluation: MicroBatches | None
    ) -> None:
        self._engine = engine
        self._recipe = recipe
        self._training = training
        self._evaluation = evaluation
        self._plan = global_batches(training.mixture, recipe.global_batch_size, recipe.seed)
        self.set_tie_margin(0.0)

    def set_tie_margin(self, tie_margin: float) -> None:
        """Set which difference of a pair's two sides, in nats per token, counts as a tie; this resets the metrics."""
        self._tie_margin = tie_margin
        self._metrics = self._new_metrics()

    def prove_step_zero(self) -> StepZeroFigures:
        """Compare the policy with the cache on the first global batch, before anything is changed."""
        proof = StepZeroProof(self._recipe.objective, dtype=self._recipe.dtype, device=self._engine.device)
        for dealt in self._dealt(self._training, self._plan.batch(0).rows):
            proof.add(self._engine.evaluate(dealt.micro_batch))
        return proof.figures()

    def update(self, step: int) -> tuple[GlobalBatch, float]:
        """Forward, backward and update on the global batch of ``step``, counted from 0.

        Returns:
            The batch, and the norm of its gradient before clipping.
        """
        batch = self._plan.batch(step)
        for dealt in self._dealt(self._training, batch.rows):
            scored = self._engine.micro_step(dealt.micro_batch, num_pairs=len(batch.rows), is_last=dealt.is_last)
            self._metrics.add(scored)
        grad_norm = self._engine.apply_update(self._recipe.learning_rate(step))
        return batch, grad_norm

    def pairs_after(self, updates_done: int) -> int:
        """Training pairs that went into the updates so far, pairs of later epochs counted again."""
        return round(self._plan.batch(updates_done - 1).epochs_done * self._plan.num_pairs)

    def line(self, batch: GlobalBatch, grad_norm: float) -> dict[str, float]:
        """The metrics since the last line; all ranks call this."""
        return step_line(
            self._metrics,
            training_step=batch.step + 1,
            learning_rate=self._recipe.learning_rate(batch.step),
            epoch=batch.epochs_done,
            grad_norm=grad_norm,
        )

    def unlogged_sums(self) -> dict[str, float]:
        """The metrics' sums since the last line, for a checkpoint; all ranks call this."""
        return self._metrics.unlogged_sums()

    def restore_sums(self, unlogged: Mapping[str, float]) -> None:
        """Restore the sums of a checkpoint, so that the next line is what it would have been; all ranks call this."""
        if self._engine.rank == 0:
            self._metrics.restore_sums(unlogged)

    def evaluate(self, updates_done: int) -> Evaluation:
        """Score all held-out pairs; all ranks call this."""
        assert self._evaluation is not None
        metrics = self._new_metrics(prefix="eval/")
        num_pairs = self._evaluation.mixture.num_pairs
        margins = EvalMargins(num_pairs, device=self._engine.device)
        for start in range(0, num_pairs, self._recipe.global_batch_size):
            rows = np.arange(start, min(start + self._recipe.global_batch_size, num_pairs))
            for dealt in self._dealt(self._evaluation, rows):
                scored = self._engine.evaluate(dealt.micro_batch)
                metrics.add(scored)
                margins.add(dealt.rows, scored)
        return Evaluation(
            line={"training_step": updates_done, **metrics.reduce()},
            margins=margins.reduce() if self._recipe.objective.uses_reference else None,
        )

    def time_heaviest_batches(self) -> float:
        """A whole update on the first epoch's batch of most tokens and on that of the longest pair, with rate 0.

        The first time is not counted: kernels are compiled, connections made and the optimizer's state allocated.

        Returns:
            Seconds of the slower one.
        """
        batches = [self._plan.batch(step) for step in range(self._plan.steps_per_epoch)]
        heaviest = {
            max(batches, key=lambda batch: self._training.tokens(batch.rows)).step,
            max(batches, key=lambda batch: self._training.longest(batch.rows)).step,
        }
        for step in heaviest:
            self._time_batch(batches[step])
        return max(self._time_batch(batches[step]) for step in heaviest)

    def peak_memory_gib(self) -> float:
        """The most memory any rank has held; all ranks call this."""
        return self._new_metrics().reduce()["perf/peak_memory_gib"]

    def _dealt(self, source: MicroBatches, rows: npt.NDArray[np.int64]) -> Iterator[_Dealt]:
        """This rank's micro-batches of a global batch."""
        shares = source.of(rows)
        micro_batches = source.read(shares)
        if self._recipe.objective.sorts_global_batch:
            micro_batches = iter(self._engine.with_partners(micro_batches))
        for number, (share, micro_batch) in enumerate(zip(shares, micro_batches, strict=True), start=1):
            yield _Dealt(rows=share, micro_batch=micro_batch, is_last=number == len(shares))

    def _time_batch(self, batch: GlobalBatch) -> float:
        started = time.perf_counter()
        for dealt in self._dealt(self._training, batch.rows):
            self._engine.micro_step(dealt.micro_batch, num_pairs=len(batch.rows), is_last=dealt.is_last)
        self._engine.apply_update(0.0)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def _new_metrics(self, prefix: str = "") -> PairMetrics:
        return PairMetrics(
            self._recipe.objective,
            device=self._engine.device,
            tie_margin=self._tie_margin,
            cost=ModelCost.of_model(self._engine.scorer.model),
            prefix=prefix,
        )

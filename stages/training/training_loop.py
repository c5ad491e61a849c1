"""The loop of stage two, in the order of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
from ...pipeline.training.metrics import PairMetrics, step_line
from ...pipeline.training.micro_batch import MicroBatch, collate
from ...pipeline.training.policy_engine import PolicyEngine
from ...pipeline.training.step_zero import StepZeroFigures, StepZeroProof
from ...pipeline.training.weight_change import WeightSample
from ..processes.background import ReadAhead
from ..processes.process_group import say_once
from .recipe import Recipe, global_batches

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dealt:
    """One micro-batch of this rank, as a global batch was dealt.

    Attributes:
        rows: The rows of the mixture it holds.
        micro_batch: Those pairs.
        num_pairs: Pairs of the global batch, over all ranks and micro-batches.
        is_last: Whether it is this rank's last one of the global batch.
    """

    rows: Rows
    micro_batch: MicroBatch
    num_pairs: int
    is_last: bool


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

    @contextmanager
    def read(self, global_batches: Iterable[Rows]) -> Iterator[Iterator[Dealt]]:
        """This rank's micro-batches of these global batches, in order and on the device.

        They are read and laid out in a thread, ahead of what is worked on and beyond the end of a global batch: the
        device does not wait for the first pairs of an update.
        """
        with ReadAhead(self._laid_out(global_batches)) as dealt:
            yield (replace(one, micro_batch=one.micro_batch.to(self._device, non_blocking=True)) for one in dealt)

    def _laid_out(self, global_batches: Iterable[Rows]) -> Iterator[Dealt]:
        for rows in global_batches:
            shares = self._shares(rows)
            for number, share in enumerate(shares, start=1):
                # Without rows an empty batch, with which the rank still joins the collectives.
                micro_batch = collate(self._stream.read(share), self._layout)
                yield Dealt(
                    rows=share,
                    micro_batch=micro_batch.pin_memory() if self._device.type == "cuda" else micro_batch,
                    num_pairs=len(rows),
                    is_last=number == len(shares),
                )

    def _shares(self, rows: Rows) -> list[Rows]:
        """This rank's share of a global batch: rows of each micro-batch, as many of them as on any other rank."""
        dealt = self._deal(
            rows,
            self._lengths[rows],
            num_ranks=self._num_ranks,
            tokens_per_microbatch=self._tokens_per_microbatch,
        )
        return dealt[self._rank]

    def tokens(self, rows: Rows) -> int:
        """What these pairs cost, in tokens: prompt and both responses, or if padded, prompt and longer response."""
        return int(self._lengths[rows].sum())

    def longest(self, rows: Rows) -> int:
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
        self._has_moved = False
        self.set_tie_margin(0.0)

    def set_tie_margin(self, tie_margin: float) -> None:
        """Set which difference of a pair's two sides, in nats per token, counts as a tie; this resets the metrics."""
        self._tie_margin = tie_margin
        self._metrics = self._new_metrics()

    def prove_step_zero(self) -> StepZeroFigures:
        """Compare the policy with the cache on the first global batch, before anything is changed."""
        proof = StepZeroProof(self._recipe.objective, dtype=self._recipe.dtype, device=self._engine.device)
        with self._training.read([self._plan.rows(0)]) as dealt:
            for one in self._of_one_batch(dealt):
                proof.add(self._engine.evaluate(one.micro_batch))
        return proof.figures()

    @contextmanager
    def updates(self, steps: range) -> Iterator[Iterator[float]]:
        """The updates of ``steps``, counted from 0: forward, backward and update, each when its turn comes.

        They give the norm of their gradient before clipping.
        """
        with self._training.read(map(self._plan.rows, steps)) as dealt:
            yield (self._update(step, dealt) for step in steps)

    def _update(self, step: int, dealt: Iterator[Dealt]) -> float:
        for one in self._of_one_batch(dealt):
            scored = self._engine.micro_step(one.micro_batch, num_pairs=one.num_pairs, is_last=one.is_last)
            self._metrics.add(scored)
        return self._apply_update(step)

    def _apply_update(self, step: int) -> float:
        rate = self._recipe.learning_rate(step)
        if self._has_moved or rate == 0:  # in a warm-up the first update has rate 0
            return self._engine.apply_update(rate)
        before = WeightSample(self._engine.master_weights())
        grad_norm = self._engine.apply_update(rate)
        changed = before.changed(self._engine.device)
        say_once(
            f"update {step + 1}, with learning rate {rate:.3g}, changed {changed.float32:.1%} of the float32 weights; "
            f"{changed.bfloat16:.1%} differ in bfloat16"
        )
        self._has_moved = True
        return grad_norm

    def pairs_after(self, updates_done: int) -> int:
        """Training pairs that went into the updates so far, pairs of later epochs counted again."""
        return round(self._plan.epochs_after(updates_done) * self._plan.num_pairs)

    def line(self, updates_done: int, grad_norm: float) -> dict[str, float]:
        """The metrics since the last line; all ranks call this."""
        return step_line(
            self._metrics,
            training_step=updates_done,
            learning_rate=self._recipe.learning_rate(updates_done - 1),
            epoch=self._plan.epochs_after(updates_done),
            grad_norm=grad_norm,
        )

    def unlogged_sums(self) -> dict[str, float]:
        """The metrics' sums since the last line, for a checkpoint; all ranks call this."""
        return self._metrics.unlogged_sums()

    def restore_sums(self, unlogged: Mapping[str, float]) -> None:
        """Restore the sums of a checkpoint, so that the next line is what it would have been; all ranks call this."""
        if self._engine.rank == 0:
            self._metrics.restore_sums(unlogged)

    def evaluate(self, updates_done: int, is_to_stop: Callable[[], bool]) -> Evaluation | None:
        """Score all held-out pairs; all ranks call this.

        Args:
            updates_done: Of the run.
            is_to_stop: Asked before each batch, on all ranks with the same answer; True ends this with None.
        """
        assert self._evaluation is not None
        metrics = self._new_metrics(prefix="eval/")
        num_pairs = self._evaluation.mixture.num_pairs
        margins = EvalMargins(num_pairs, device=self._engine.device)
        size = self._recipe.global_batch_size
        batches = np.split(np.arange(num_pairs), range(size, num_pairs, size))
        with self._evaluation.read(batches) as dealt:
            for _ in batches:
                if is_to_stop():
                    return None
                for one in self._of_one_batch(dealt):
                    scored = self._engine.evaluate(one.micro_batch)
                    metrics.add(scored)
                    margins.add(one.rows, scored)
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
        batches = [self._plan.rows(step) for step in range(self._plan.steps_per_epoch)]
        steps = range(len(batches))
        heaviest = {
            max(steps, key=lambda step: self._training.tokens(batches[step])),
            max(steps, key=lambda step: self._training.longest(batches[step])),
        }
        for step in heaviest:
            self._time_batch(batches[step])
        return max(self._time_batch(batches[step]) for step in heaviest)

    def peak_memory_gib(self) -> float:
        """The most memory any rank has held; all ranks call this."""
        return self._new_metrics().reduce()["perf/peak_memory_gib"]

    def _of_one_batch(self, dealt: Iterator[Dealt]) -> Iterable[Dealt]:
        """The micro-batches up to the end of a global batch."""
        if not self._recipe.objective.sorts_global_batch:
            return _until_last(dealt)
        batch = list(_until_last(dealt))
        with_partners = self._engine.with_partners(one.micro_batch for one in batch)
        return [replace(one, micro_batch=found) for one, found in zip(batch, with_partners, strict=True)]

    def _time_batch(self, rows: Rows) -> float:
        started = time.perf_counter()
        with self._training.read([rows]) as dealt:
            for one in self._of_one_batch(dealt):
                self._engine.micro_step(one.micro_batch, num_pairs=one.num_pairs, is_last=one.is_last)
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


def _until_last(dealt: Iterator[Dealt]) -> Iterator[Dealt]:
    for one in dealt:
        yield one
        if one.is_last:
            return

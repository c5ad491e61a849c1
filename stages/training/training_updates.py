"""The updates of one run and what comes between them: log lines, evaluations, models, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from ...pipeline.cache.parquet_file import KEY_COLUMN
from ...pipeline.report.run_record import logged_line
from ...pipeline.training.eval_margins import EVAL_MARGINS, write_eval_margins
from ...pipeline.training.run_log import RunLog
from ..processes.process_group import any_rank, decided_by_first, say_once
from .best_model import BestModel
from .prepared_run import PreparedRun
from .started_run import StartedRun

MODELS = "models"
"""Folder of the models between the first update and the last, in a run's folder."""


class TrainingUpdates:
    """What one process does of a run, from the updates done before it to the last it has to do.

    Every method is collective: all ranks call it, in the same order.

    Args:
        run: What was prepared.
        started: The policy, at the first update to do.
        log: Where lines go; closed here only when the run is asked to stop.
        best: The best evaluation before the first update to do.
    """

    def __init__(self, run: PreparedRun, started: StartedRun, log: RunLog, best: BestModel) -> None:
        self._run = run
        self._config = run.config
        self._started = started
        self._loop = started.loop
        self._log = log
        self._best = best
        self._first_step = started.first_step
        self._last_step = run.checkpoints.last_step

    @property
    def updates_done(self) -> int:
        """Updates of the run once these are done."""
        return max(self._first_step, self._last_step)

    def evaluate_before(self) -> dict[str, float] | None:
        """The evaluation before the first update of the run; a resumed run has it already."""
        return self._evaluate(0) if self._started.checkpoint is None else self._logged(0, "eval/loss")

    def carry_out(self, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Do the updates; the last logged line.

        Raises:
            KeyboardInterrupt: Asked to stop; a checkpoint was saved.
        """
        line: dict[str, float] = {}
        self._make_up_for_evaluation(stop_requested)
        with self._loop.updates(range(self._first_step, self._last_step)) as grad_norms:
            for done, grad_norm in enumerate(grad_norms, start=self._first_step + 1):
                self._log.advance()
                is_last = done == self._last_step
                if is_last or done % self._config.logging_steps == 0:
                    line = self._loop.line(done, grad_norm)
                    self._log.write(line)
                # The model first: what resumes from the checkpoint does not come by here again.
                if self._run.checkpoints.is_model_due(done):
                    self._started.models.write(self._config.output / MODELS / f"step_{done}", line, None)
                if self._run.checkpoints.is_due(done):
                    self._save_checkpoint(done)
                if any_rank(stop_requested(), self._run.device) and not is_last:
                    self._stop(done)
                if self._evaluates_after(done) and not is_last:
                    self._evaluate_or_stop(done, line, stop_requested)
        return line or self._logged(self._first_step, "train_loss") or {}  # nothing was left to do

    def _make_up_for_evaluation(self, stop_requested: Callable[[], bool]) -> None:
        """Evaluate what was resumed from, where the run stopped before it had done so."""
        done = self._first_step
        if done == 0 or done >= self._last_step or not self._evaluates_after(done):
            return
        line = self._logged(done, "train_loss") or {}
        evaluation = decided_by_first(lambda: self._logged(done, "eval/loss"))
        if evaluation is None:
            self._evaluate_or_stop(done, line, stop_requested)
        else:
            self._keep_best(line, evaluation)  # which may have been next

    def _evaluate_or_stop(self, done: int, line: dict[str, float], stop_requested: Callable[[], bool]) -> None:
        evaluation = self._evaluate(done, stop_requested)
        if evaluation is None:
            self._stop(done)
        self._keep_best(line, evaluation)

    def _save_checkpoint(self, done: int) -> None:
        self._run.checkpoints.save(
            self._started.engine,
            updates_done=done,
            unlogged=self._loop.unlogged_sums(),
            tracking_run_id=self._log.tracking_run_id,
        )

    def _stop(self, done: int) -> NoReturn:
        if done != self._first_step and not self._run.checkpoints.is_due(done):
            self._save_checkpoint(done)
        self._log.close()
        say_once(f"the checkpoint after update {done} of {self._run.recipe.total_steps} is saved")
        raise KeyboardInterrupt

    def evaluate_after(self) -> dict[str, float] | None:
        """The evaluation after the last update; a finished run that is resumed has it already."""
        if self._first_step >= self._last_step:
            evaluation = decided_by_first(lambda: self._logged(self.updates_done, "eval/loss"))
            if evaluation is not None:
                return evaluation
        return self._evaluate(self.updates_done)

    def save_model(self, line: dict[str, float], evaluation: dict[str, float] | None) -> None:
        """Save what the last update left: as the best model, where it is, and as the model of a finished run.

        Args:
            line: The last logged line.
            evaluation: The one after the last update.
        """
        is_finished = self.updates_done == self._run.recipe.total_steps
        if is_finished or self._evaluates_after(self.updates_done):
            self._keep_best(line, evaluation)
        if is_finished:
            self._started.models.write(self._config.output / "model", line, evaluation)

    def _evaluates_after(self, updates_done: int) -> bool:
        return self._config.eval_steps is not None and updates_done % self._config.eval_steps == 0

    def _evaluate(self, updates_done: int, stop_requested: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """The logged line; None without a mixture to evaluate on, or if asked to stop meanwhile."""
        mixture = self._run.pairs.eval_mixture
        if mixture is None:
            return None
        evaluation = self._loop.evaluate(
            updates_done, lambda: stop_requested is not None and any_rank(stop_requested(), self._run.device)
        )
        if evaluation is None:
            return None
        if self._run.is_main and evaluation.margins is not None:
            write_eval_margins(
                self._config.output / EVAL_MARGINS,
                training_step=updates_done,
                keys=mixture.table.column(KEY_COLUMN),
                margins=evaluation.margins,
            )
        self._log.write(evaluation.line)  # last: a resumed run that finds the line does not evaluate again
        return evaluation.line

    def _keep_best(self, line: dict[str, float], evaluation: dict[str, float] | None) -> None:
        if evaluation is None or not self._best.is_beaten_by(evaluation):
            return
        self._started.models.write(self._config.output / "best", line, evaluation)
        self._best.remember(evaluation, is_main=self._run.is_main)

    def _logged(self, step: int, field: str) -> dict[str, float] | None:
        """As rank 0 knows it: it writes the file, and whatever is told of it."""
        return logged_line(self._config.output, step, field) if self._run.is_main else None

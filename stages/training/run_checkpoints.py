"""The checkpoints of one run, in ``checkpoints/`` of its folder: finding one to resume from, loading, saving."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial

import torch

from ...errors import DpoCacheError, as_argument
from ...pipeline.data.named_path import named_path
from ...pipeline.training.checkpoint_folder import (
    Checkpoint,
    TrainerState,
    bytes_later_than,
    newest_checkpoint,
    num_complete,
    open_checkpoint,
    remove_later_than,
    remove_unfinished,
)
from ...pipeline.training.checkpoints import convert_checkpoint, load_checkpoint, needs_conversion, save_checkpoint
from ...pipeline.training.disk_space import PlannedFiles, check_free_space, planned_sizes
from ...pipeline.training.host_group import wait_for_all
from ...pipeline.training.policy_engine import PolicyEngine
from ...pipeline.training.same_run import changed_values, check_same_run
from ..console.counted_noun import counted
from ..console.terminal import say
from ..processes.process_group import all_or_none, decided_by_first, say_once
from ..processes.ranks import Ranks
from .changed_options import changed_options
from .output_folder import held_by
from .recipe import Recipe
from .run_config import recorded_fingerprint, recorded_settings
from .train_config import TrainConfig

CONVERTED = "converted"
"""A checkpoint in the form that any number of ranks can load; it is here only while it is loaded."""


class RunCheckpoints:
    """Finds, loads and saves the checkpoints of a run; all ranks call its methods together.

    Args:
        config: The settings.
        recipe: The resolved numbers.
        ranks: Which rank of how many this is.
        policy_sha256: Of the weights that the policy starts from, which a checkpoint of an adapter needs again.

    Attributes:
        fingerprint: What has to be the same for the run to be resumed.
    """

    def __init__(self, config: TrainConfig, recipe: Recipe, ranks: Ranks, *, policy_sha256: str) -> None:
        self._config = config
        self._recipe = recipe
        self._ranks = ranks
        self.fingerprint = recipe.resume_fingerprint(policy_sha256)
        self._folder = config.output / "checkpoints"
        self._keep_last = None if config.keep_last_n_checkpoints == -1 else config.keep_last_n_checkpoints

    def find(self) -> Checkpoint | None:
        """The checkpoint to resume from, the same on all ranks; None for a fresh start.

        Raises:
            DpoCacheError: It is not complete, or belongs to a run with other settings; the folder has evaluations of
                another mixture; or the run is finished and its checkpoints are gone. On all ranks alike.
        """
        if self._config.resume is None:
            return None
        checkpoint = decided_by_first(lambda: self._choose(str(self._config.resume)))
        if checkpoint is None:
            say_once(f"no complete checkpoint in {self._folder}: starting from the beginning")
        else:
            is_finished = checkpoint.state.step >= self._recipe.total_steps
            nothing_left = "; all updates are done, only what follows them is repeated" if is_finished else ""
            say_once(f"resuming from {checkpoint.path}{nothing_left}")
        return checkpoint

    def is_converted(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is loaded in the form that any number of ranks can load."""
        return needs_conversion(checkpoint, num_ranks=self._ranks.num_ranks)

    def load(self, engine: PolicyEngine, checkpoint: Checkpoint) -> None:
        """Load it into an engine that was made for it.

        Raises:
            DpoCacheError: It could not be converted; on all ranks alike.
        """
        if not self.is_converted(checkpoint):
            load_checkpoint(engine, checkpoint)
            return
        say_once(
            f"converting a checkpoint of {counted(checkpoint.state.num_ranks, 'rank')} for {self._ranks.num_ranks}"
        )
        converted = self._folder / CONVERTED
        all_or_none(lambda: convert_checkpoint(checkpoint, converted), on=self._ranks.rank == 0)
        load_checkpoint(engine, checkpoint, converted=converted)
        wait_for_all()  # all ranks have read it
        if self._ranks.rank == 0:
            shutil.rmtree(converted, ignore_errors=True)

    def remove_later(self, step: int) -> None:
        """Remove the checkpoints of updates past ``step``, which will be done again."""
        if self._ranks.rank != 0:
            return
        removed = [path.name for path in remove_later_than(step, self._folder)]
        if removed:
            say(f"removed the checkpoints past update {step}: {', '.join(removed)}")

    def check_free_space(self, engine: PolicyEngine, saved_dtype: torch.dtype, *, first_step: int) -> None:
        """Check that the disk has room for checkpoints and models, before any time is spent on training.

        Args:
            engine: The policy.
            saved_dtype: What the model is written in.
            first_step: Updates done before this process.

        Raises:
            DpoCacheError: There is too little room; on all ranks alike.
        """

        def check() -> None:
            config = self._config
            to_do = range(first_step + 1, self.last_step + 1)
            planned = PlannedFiles(
                **planned_sizes(
                    engine.parameters(),
                    zero_stage=config.zero_stage,
                    weight_bytes=4 if self._recipe.dtype == "float32" else 2,
                    saved_bytes=saved_dtype.itemsize,
                    only_adapter=config.saves_adapter,
                ),
                checkpoints_to_save=sum(map(self.is_due, to_do)),
                models_to_save=sum(map(self.is_model_due, to_do)),
                checkpoints_held=num_complete(self._folder, up_to=first_step),
                keep_last=self._keep_last,
                keeps_best=config.keep_best is not None,
                has_best=(config.output / "best").exists(),
                saves_model=self.last_step == self._recipe.total_steps,
            )
            check_free_space(config.output, planned, freed_bytes=bytes_later_than(first_step, self._folder))

        all_or_none(check, on=self._ranks.rank == 0)

    @property
    def last_step(self) -> int:
        """Updates of the run that are done when this process ends."""
        return self._config.stop_after_steps or self._recipe.total_steps

    def is_due(self, updates_done: int) -> bool:
        """Whether a checkpoint is saved after so many updates; one is after the last, whatever it is."""
        every = self._config.checkpointing_steps
        return updates_done == self.last_step or (every is not None and updates_done % every == 0)

    def is_model_due(self, updates_done: int) -> bool:
        """Whether a model is saved after so many updates beside that of the finished run."""
        every = self._config.model_saving_steps
        return every is not None and updates_done % every == 0 and updates_done != self._recipe.total_steps

    def save(
        self, engine: PolicyEngine, *, updates_done: int, unlogged: Mapping[str, float], tracking_run_id: str | None
    ) -> None:
        """Save everything that a resumed run needs; collective."""
        save_checkpoint(
            engine,
            self._folder,
            TrainerState(
                step=updates_done,
                num_ranks=self._ranks.num_ranks,
                zero_stage=self._config.zero_stage,
                run=self.fingerprint,
                tracking_run_id=tracking_run_id,
                unlogged=unlogged,
            ),
            keep_last=self._keep_last,
        )

    def _choose(self, resume: str) -> Checkpoint | None:
        is_named = resume != "latest"
        checkpoint = open_checkpoint(named_path(resume)) if is_named else newest_checkpoint(self._folder)
        if checkpoint is not None:
            self._refuse_other_evaluation(checkpoint)
            check_same_run(
                checkpoint,
                run=self.fingerprint,
                zero_stage=self._config.zero_stage,
                causes=partial(changed_options, checkpoint.run_folder, self._config),
            )
            if is_named:
                self._refuse_other_output(checkpoint)
        elif (self._config.output / "model").exists():
            raise DpoCacheError(
                f"the run in {self._config.output} is finished, and its checkpoints are gone",
                expected="a checkpoint to go on from, or a run that has not begun",
                next_step="its model is in model/; to train again, give another --output",
            )
        remove_unfinished(self._folder)  # before the free space is looked at
        shutil.rmtree(self._folder / CONVERTED, ignore_errors=True)
        return checkpoint

    def _refuse_other_evaluation(self, checkpoint: Checkpoint) -> None:
        """Evaluations that are there are not repeated, and the best model is chosen among them and those to come."""
        output, now = self._config.output, self._config.eval_mixture
        before = recorded_settings(output).get("eval_mixture")
        if before and now and before != now:
            raise DpoCacheError(
                f"--eval-mixture is {now}, but the evaluations in {output} are of {before}",
                expected="the same held-out pairs all along",
                next_step=f"give {before}, or go on in another --output with --resume {as_argument(checkpoint.path)}",
            )

    def _refuse_other_output(self, checkpoint: Checkpoint) -> None:
        """A checkpoint from elsewhere begins a new folder, or continues the same run: it replaces no other run."""
        output = self._config.output
        is_its_own = checkpoint.path.absolute().parent.resolve() == self._folder.resolve()
        if is_its_own or not held_by(output):
            return
        different = changed_values(recorded_fingerprint(output), self.fingerprint)
        if different:
            raise DpoCacheError(
                f"--output {output} holds another run than that of {checkpoint.path}: {'; '.join(different)}",
                expected="a new folder, or the run that the checkpoint is of",
                next_step=f"give another --output to continue from {checkpoint.path}",
            )

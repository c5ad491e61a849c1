"""One training run, as one of its ranks sees it: set up, prove, train, save."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...errors import DpoCacheError
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.parquet_file import KEY_COLUMN
from ...pipeline.report.run_record import metrics_lines
from ...pipeline.scoring.layout_choice import choose_layout
from ...pipeline.scoring.model_loading import load_config, noise_of
from ...pipeline.scoring.pair_scorer import PairScorer
from ...pipeline.scoring.scoring_batch import Layout
from ...pipeline.training.checkpoint_folder import Checkpoint
from ...pipeline.training.deepspeed_config import EngineSettings, deepspeed_config
from ...pipeline.training.eval_margins import EVAL_MARGINS, write_eval_margins
from ...pipeline.training.host_group import wait_for_all
from ...pipeline.training.host_memory import set_large_blocks_apart
from ...pipeline.training.policy_engine import PolicyEngine
from ...pipeline.training.run_log import RunLog, TrackingSettings
from ...pipeline.training.step_zero import StepZeroFigures, check_step_zero, read_step_zero, write_step_zero
from ...pipeline.training.tensor_headers import checkpoint_dtype
from ...pipeline.training.tensorboard_files import require_tensorboard
from ..console.progress import Progress
from ..console.terminal import say
from ..hub.hub_model import HubTarget, prepare_hub_target
from ..processes.devices import memory_explained, share_cores
from ..processes.process_group import all_or_none, any_rank, decided_by_first, refuse_other_settings, say_once
from ..processes.ranks import Ranks
from ..processes.stop_request import stop_requests
from .best_model import BestModel
from .held_out_overlap import overlap_warnings
from .model_writer import ModelWriter
from .output_folder import output_lock, refuse_overwriting, write_json
from .policy import PolicyOrigin, check_policy, find_policy, load_policy
from .recipe import resolve_recipe, warnings_of
from .run_checkpoints import RunCheckpoints
from .train_config import TrainConfig
from .train_dry_run import DryRunReport
from .train_report import TrainReport
from .training_cache import training_cache
from .training_loop import MicroBatches, TrainingLoop

WHERE_THINGS_LIE = {"cache", "model"}
"""Settings that may differ from machine to machine: what lies there is compared by its digests."""

LESS_MEMORY = (
    "--gradient-checkpointing, a smaller --tokens-per-microbatch, more GPUs at --zero-stage 3, --offload-optimizer, or "
    "--use-lora; --dry-run measures each"
)


class TrainingRun:
    """Everything between the settings and the trained model.

    Args:
        config: The settings.
        ranks: Which rank of how many this is; the process group stands.
        device: This rank's device.
        cache_folder: Where the cache lies on this machine.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, cache_folder: Path) -> None:
        self._config = config
        self._cache_folder = cache_folder
        self._ranks = ranks
        self._device = device
        self._is_main = ranks.rank == 0
        self._started = time.monotonic()
        self.hub_target: HubTarget | None = None

    @memory_explained(LESS_MEMORY)
    def run(self) -> TrainReport:
        """Run it to its end, or until it is asked to stop.

        Raises:
            DpoCacheError: On all ranks alike.
            KeyboardInterrupt: Asked to stop; a checkpoint was saved.
        """
        with ExitStack() as held:
            self._prepare(held)
            origin = self._find_policy()
            checkpoint = self._checkpoints.find(origin.sha256)
            self.hub_target = all_or_none(lambda: self._prepare_hub(origin), on=self._is_main)
            self._write_config(origin)
            self._start_engine(origin, checkpoint)
            return self._train(origin, checkpoint)

    @memory_explained(LESS_MEMORY)
    def dry_run(self) -> DryRunReport:
        """The heaviest global batches with learning rate 0, and one save; nothing is trained or kept.

        Raises:
            DpoCacheError: On all ranks alike.
        """
        with ExitStack() as held:
            self._prepare(held)
            self._start_engine(self._find_policy(), None)
            seconds_per_step = self._loop.time_heaviest_batches()
            trial = self._config.output / "model.dry-run"
            saving = time.monotonic()
            self._models.write(trial, {}, None)
            report = DryRunReport(
                seconds_per_step=seconds_per_step,
                hours=seconds_per_step * self._recipe.total_steps / 3600,
                seconds_per_save=time.monotonic() - saving,
                peak_memory_gib=self._loop.peak_memory_gib(),
                steps=self._recipe.total_steps,
            )
            if self._is_main:
                shutil.rmtree(trial, ignore_errors=True)
                report.write(self._config.output)
            return report

    # ---- before the model is loaded --------------------------------------------------------------------------------

    def _prepare(self, held: ExitStack) -> None:
        settings = asdict(self._config)
        refuse_other_settings({name: value for name, value in settings.items() if name not in WHERE_THINGS_LIE})
        all_or_none(require_tensorboard, on=self._is_main and self._config.with_tensorboard)
        all_or_none(lambda: self._claim_output(held), on=self._is_main)
        self._pairs = held.enter_context(training_cache(self._config, self._cache_folder, self._ranks))
        self._recipe = resolve_recipe(
            self._config, self._pairs.cache, self._pairs.mixture, num_ranks=self._ranks.num_ranks
        )
        self._checkpoints = RunCheckpoints(self._config, self._recipe, self._ranks)
        if self._is_main:
            for warning in (
                *warnings_of(self._recipe),
                *overlap_warnings(self._pairs.mixture, self._pairs.eval_mixture),
            ):
                say(f"warning: {warning}")

    def _claim_output(self, held: ExitStack) -> None:
        if self._config.resume is None:
            refuse_overwriting(self._config.output)
        held.enter_context(output_lock(self._config.output))

    def _find_policy(self) -> PolicyOrigin:
        model = all_or_none(lambda: find_policy(self._config, self._pairs.cache))
        assert model is not None
        # Hashing the weights is for one rank; what it finds, all have to know.
        origin = decided_by_first(lambda: check_policy(self._config, self._pairs.cache.identity, model))
        return replace(origin, model=model)

    def _prepare_hub(self, origin: PolicyOrigin) -> HubTarget | None:
        if not self._config.push_to_hub:
            return None
        if self._config.saves_adapter and origin.model.commit is None:
            raise DpoCacheError(
                f"--push-to-hub: an adapter names the model it belongs on, and {origin.model.name} is a folder here",
                expected="a model of the Hub under the adapter",
                next_step="add --merge to upload a whole model, or train from a Hub id: --model OWNER/NAME",
            )
        name = self._config.resolved_run_name
        return prepare_hub_target(
            self._config.hub_model_id, branch=self._config.hub_revision or name, private=self._config.hub_private
        )

    def _write_config(self, origin: PolicyOrigin) -> None:
        if not self._is_main:
            return
        given = asdict(self._config)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        resolved = {"policy": origin.model.name, "policy_is_reference": origin.is_reference, **self._recipe.to_json()}
        write_json(self._config.output / "config.json", {"settings": settings, "resolved": resolved})

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _start_engine(self, origin: PolicyOrigin, checkpoint: Checkpoint | None) -> None:
        set_large_blocks_apart()
        if self._config.offload_optimizer:
            share_cores(self._ranks.ranks_per_node)
        model_config = load_config(origin.model.folder, trust_remote_code=self._config.trust_remote_code)
        if self._is_main and (noise := noise_of(model_config)):
            names = ", ".join(f"{name} {value:g}" for name, value in noise.items())
            say(f"the model's dropout ({names}) is off, because the reference was scored without it")
        engine_config = deepspeed_config(
            EngineSettings(
                zero_stage=self._config.zero_stage,
                dtype=self._recipe.dtype,
                max_grad_norm=self._config.max_grad_norm,
                num_ranks=self._ranks.num_ranks,
                hidden_size=model_config.get_text_config().hidden_size,
                on_gpu=self._device.type == "cuda",
                offload_optimizer=self._config.offload_optimizer,
                offload_parameters=self._config.offload_parameters,
                hierarchical_partition_size=self._config.zero_hpz_partition_size,
                load_universal=checkpoint is not None and self._checkpoints.is_converted(checkpoint),
            )
        )
        policy = load_policy(self._config, self._recipe, origin.model, self._device, engine_config)
        self._engine = PolicyEngine(
            PairScorer(policy, load_balancing=self._config.load_balancing_loss),
            config=engine_config,
            loss=self._recipe.loss,
            weight_decay=self._recipe.weight_decay,
            adam_betas=(self._recipe.adam_beta1, self._recipe.adam_beta2),
            adam_epsilon=self._recipe.adam_epsilon,
            bad_batch_path=self._config.output / "bad_batch.json",
            load_balancing_weight=self._recipe.load_balancing_weight or 0.0,
        )
        self._checkpoints.check_free_space(self._engine, checkpoint_dtype(origin.model.folder))
        layout = choose_layout(self._engine.deepspeed, device=self._device)
        if checkpoint is not None:
            self._checkpoints.load(self._engine, checkpoint)
        self._loop = TrainingLoop(
            self._engine,
            self._recipe,
            self._micro_batches(self._pairs.mixture, layout),
            self._micro_batches(self._pairs.eval_mixture, layout) if self._pairs.eval_mixture else None,
        )
        self._models = ModelWriter(self._config, self._recipe, self._pairs, origin.model, self._engine)

    def _micro_batches(self, mixture: Mixture, layout: Layout) -> MicroBatches:
        return MicroBatches(
            self._pairs.cache,
            mixture,
            layout=layout,
            engine=self._engine,
            tokens_per_microbatch=self._recipe.tokens_per_microbatch,
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self, origin: PolicyOrigin, checkpoint: Checkpoint | None) -> TrainReport:
        first_step = checkpoint.state.step if checkpoint else 0
        last_step = self._config.stop_after_steps or self._recipe.total_steps
        step_zero = self._prove_step_zero(origin) if checkpoint is None else self._recorded_step_zero()
        self._loop.count_as_ties(step_zero.tie_margin if step_zero else 0.0)
        if checkpoint is not None and checkpoint.state.unlogged:
            self._loop.go_on_from(checkpoint.state.unlogged)
        self._checkpoints.forget_later(first_step)
        self._log = self._open_log(checkpoint, first_step)
        self._best = BestModel(self._config.output, by=self._config.keep_best, last_step=first_step)
        wait_for_all()  # all ranks have read what rank 0 is about to write
        eval_before = self._evaluate(0) if checkpoint is None else self._logged(0, "eval/loss")
        with stop_requests() as stop_requested:
            line = self._update_until_done(range(first_step, last_step), stop_requested)
        line = line or self._logged(first_step, "train_loss") or {}  # nothing was left to do
        updates_done = max(first_step, last_step)
        eval_after = self._last_evaluation(updates_done, came_here_finished=first_step >= last_step)
        is_finished = updates_done == self._recipe.total_steps
        if is_finished or self._evaluates_after(updates_done):
            self._keep_best(line, eval_after)
        if is_finished:
            self._models.write(self._config.output / "model", line, eval_after)
        self._log.close()  # last: without a network a tracker may wait for hours, and nothing is to wait for it
        return self._report(step_zero, eval_before, eval_after, line, updates_done=updates_done)

    def _prove_step_zero(self, origin: PolicyOrigin) -> StepZeroFigures:
        figures = self._loop.prove_step_zero()
        if self._is_main:
            write_step_zero(self._config.output / "step0.json", figures)
        if origin.is_reference and not self._config.allow_numerics_mismatch:
            check_step_zero(figures)
        elif not figures.within_bound:
            allowed = "--allow-numerics-mismatch" if origin.is_reference else "--allow-other-policy"
            say_once(f"warning: {figures.summary()}; the run goes on, because {allowed} was given")
        return figures

    def _open_log(self, checkpoint: Checkpoint | None, first_step: int) -> RunLog:
        progress = tracking = None
        if self._is_main:
            progress = Progress(
                self._recipe.total_steps, unit="step", title="train", done_before=first_step, notes_hold_rate=True
            )
        if self._config.with_tracking:
            tracking = TrackingSettings(
                project=self._config.wandb_project,
                entity=self._config.wandb_entity,
                tags=self._config.wandb_tags,
                name=self._config.resolved_run_name,
                run_id=checkpoint.state.tracking_run_id if checkpoint else None,
                config=self._recipe.to_json(),
            )
        return RunLog(
            self._config.output,
            is_main=self._is_main,
            last_step=first_step,
            progress=progress,
            tracking=tracking,
            tensorboard=self._config.with_tensorboard,
        )

    def _update_until_done(self, steps: range, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """The updates ``steps``, counted from 0; the last logged line."""
        line: dict[str, float] = {}
        for step in steps:
            batch, grad_norm = self._loop.update(step)
            self._log.advance()
            done, is_last = step + 1, step + 1 == steps.stop
            if is_last or done % self._config.logging_steps == 0:
                line = self._loop.line(batch, grad_norm)
                self._log.write(line)
            if self._evaluates_after(done) and not is_last:
                self._keep_best(line, self._evaluate(done))
            stop = any_rank(stop_requested(), self._device) and not is_last
            if stop or is_last or (self._config.checkpointing_steps and done % self._config.checkpointing_steps == 0):
                self._checkpoints.save(
                    self._engine,
                    updates_done=done,
                    unlogged=self._loop.unlogged(),
                    tracking_run_id=self._log.tracking_run_id,
                )
            if stop:
                self._log.close()
                say_once(f"saved a checkpoint after update {done} of {self._recipe.total_steps}")
                raise KeyboardInterrupt
        return line

    def _last_evaluation(self, updates_done: int, *, came_here_finished: bool) -> dict[str, float] | None:
        """The one after the last update; a finished run that is resumed has it already."""
        if came_here_finished:
            evaluation = decided_by_first(lambda: self._logged(updates_done, "eval/loss"))
            if evaluation is not None:
                return evaluation
        return self._evaluate(updates_done)

    def _evaluates_after(self, updates_done: int) -> bool:
        return self._config.eval_steps is not None and updates_done % self._config.eval_steps == 0

    def _evaluate(self, updates_done: int) -> dict[str, float] | None:
        if self._pairs.eval_mixture is None:
            return None
        evaluation = self._loop.evaluate(updates_done)
        self._log.write(evaluation.line)
        if self._is_main and evaluation.margins is not None:
            write_eval_margins(
                self._config.output / EVAL_MARGINS,
                training_step=updates_done,
                keys=self._pairs.eval_mixture.table.column(KEY_COLUMN),
                margins=evaluation.margins,
            )
        return evaluation.line

    def _keep_best(self, line: dict[str, float], evaluation: dict[str, float] | None) -> None:
        if evaluation is None or not self._best.is_beaten_by(evaluation):
            return
        self._models.write(self._config.output / "best", line, evaluation)
        self._best.remember(evaluation, is_main=self._is_main)

    def _report(
        self,
        step_zero: StepZeroFigures | None,
        eval_before: dict[str, float] | None,
        eval_after: dict[str, float] | None,
        last_line: dict[str, float],
        *,
        updates_done: int,
    ) -> TrainReport:
        report = TrainReport(
            output=str(self._config.output),
            steps=updates_done,
            total_steps=self._recipe.total_steps,
            pairs=self._loop.pairs_after(updates_done),
            seconds=time.monotonic() - self._started,
            step0=asdict(step_zero) if step_zero else None,
            eval_before=eval_before,
            eval_after=eval_after,
            last=last_line,
        )
        if self._is_main:
            report.write()
        return report

    def _logged(self, step: int, field: str) -> dict[str, float] | None:
        """The line with this field that was logged after update ``step``, by this process or one before it."""
        if not self._is_main:
            return None  # rank 0 writes the file, and whatever is told of it
        lines, _ = metrics_lines(self._config.output)
        found = [line for line in lines if line["training_step"] == step and field in line]
        return {name: value for name, value in found[-1].items() if not math.isnan(value)} if found else None

    def _recorded_step_zero(self) -> StepZeroFigures | None:
        """The proof of a resumed run was made when it began; the same on all ranks."""
        return decided_by_first(lambda: read_step_zero(self._config.output / "step0.json"))

"""One training run, as one of its ranks sees it: set up, prove, train, save."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.mixture_check import check_common_values, check_mixture
from ..pipeline.cache.parquet_file import KEY_COLUMN
from ..pipeline.scoring.layout_choice import choose_layout
from ..pipeline.scoring.model_loading import load_config
from ..pipeline.scoring.pair_scorer import PairScorer
from ..pipeline.training.checkpoints import (
    Checkpoint,
    TrainerState,
    check_free_space,
    check_same_run,
    convert_checkpoint,
    load_checkpoint,
    needs_conversion,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from ..pipeline.training.deepspeed_config import EngineSettings, deepspeed_config
from ..pipeline.training.eval_margins import FILE as EVAL_MARGINS
from ..pipeline.training.eval_margins import write_eval_margins
from ..pipeline.training.model_export import export_adapter, export_model
from ..pipeline.training.policy_engine import PolicyEngine
from ..pipeline.training.run_log import RunLog, TrackingSettings
from ..pipeline.training.step_zero import StepZeroFigures, check_step_zero, write_step_zero
from .best_model import BestModel
from .hub_model import HubTarget, prepare_hub_target
from .model_card import model_card
from .output_folder import output_lock, refuse_overwriting, write_json
from .policy import PolicyOrigin, check_policy, find_policy, load_policy
from .process_group import all_or_none, any_rank, decided_by_first, refuse_other_settings
from .progress import Progress
from .ranks import Ranks
from .recipe import resolve_recipe, warnings_of
from .stop_request import stop_requests
from .train_config import TrainConfig
from .train_dry_run import DryRunReport
from .train_report import TrainReport
from .training_loop import MicroBatches, TrainingLoop

WHERE_THINGS_LIE = {"cache", "model"}
"""Settings that may differ from machine to machine: what lies there is compared by its digests."""


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

    def run(self) -> TrainReport:
        """Run it to its end, or until it is asked to stop.

        Raises:
            DpoCacheError: On all ranks alike.
            KeyboardInterrupt: Asked to stop; a checkpoint was saved.
        """
        with ExitStack() as held:
            self._prepare(held)
            checkpoint = self._find_checkpoint()
            origin = self._find_policy()
            self.hub_target = all_or_none(lambda: self._prepare_hub(origin), on=self._is_main)
            self._write_config(origin)
            self._start_engine(origin, checkpoint)
            return self._train(origin, checkpoint)

    def dry_run(self) -> DryRunReport:
        """Forward and backward on the heaviest global batches, and one save; nothing is trained or kept.

        Raises:
            DpoCacheError: On all ranks alike.
        """
        with ExitStack() as held:
            self._prepare(held)
            origin = self._find_policy()
            self._start_engine(origin, None)
            seconds_per_step = self._loop.time_heaviest_batches()
            trial = self._config.output / "model.dry-run"
            saving = time.monotonic()
            self._export(origin, trial)
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

    def _prepare(self, held: ExitStack) -> None:
        refuse_other_settings({name: value for name, value in _fields(self._config) if name not in WHERE_THINGS_LIE})
        all_or_none(lambda: self._claim_output(held), on=self._is_main)
        self._open_cache(held)
        self._recipe = resolve_recipe(self._config, self._cache, self._mixture, num_ranks=self._ranks.num_ranks)
        for warning in warnings_of(self._recipe):
            self._say(f"warning: {warning}")

    # ---- before the model is loaded --------------------------------------------------------------------------------

    def _claim_output(self, held: ExitStack) -> None:
        if self._config.resume is None:
            refuse_overwriting(self._config.output)
        held.enter_context(output_lock(self._config.output))

    def _open_cache(self, held: ExitStack) -> None:
        """Open cache and mixtures; one rank a node keeps others from deleting and looks at every row first."""
        names = [self._config.mixture, *([self._config.eval_mixture] if self._config.eval_mixture else [])]

        def open_mixtures() -> tuple[ReferenceCache, list[Mixture]]:
            cache = ReferenceCache.open(self._cache_folder)
            return cache, [cache.read_mixture(name) for name in names]

        def check_mixtures() -> None:
            held.enter_context(ReferenceCache.open(self._cache_folder).training())
            cache, mixtures = open_mixtures()
            for mixture in mixtures:
                check_mixture(cache, mixture)
                if self._config.resolved_loss().ld_alpha != 1:
                    check_common_values(cache, mixture)

        all_or_none(check_mixtures, on=self._ranks.rank_of_node == 0)
        self._cache, mixtures = open_mixtures()
        digests = [mixture.digest for mixture in mixtures]
        first = decided_by_first(lambda: digests)
        all_or_none(lambda: self._refuse_other_mixtures(digests, first))
        self._mixture = mixtures[0]
        self._eval_mixture = mixtures[1] if self._config.eval_mixture else None

    def _refuse_other_mixtures(self, digests: list[str], first: list[str]) -> None:
        """Where each machine has a copy of its own, they may differ; the ranks would then train on different pairs."""
        if digests != first:
            raise DpoCacheError(
                f"the mixture that rank {self._ranks.rank} reads from {self._config.cache} is not that of rank 0",
                expected="the same cache on all machines",
                next_step="start again, if it was being changed; else compare dpo-cache info on each machine",
            )

    def _find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on all ranks; None for a fresh start."""
        if self._config.resume is None:
            return None
        checkpoint = decided_by_first(self._choose_checkpoint)
        if checkpoint is None:
            self._say(f"no complete checkpoint in {self._checkpoints}: starting from the beginning")
        else:
            self._say(f"going on from {checkpoint.path}")
        return checkpoint

    def _choose_checkpoint(self) -> Checkpoint | None:
        assert self._config.resume is not None
        if self._config.resume == "latest":
            checkpoint = newest_checkpoint(self._checkpoints)
        else:
            checkpoint = open_checkpoint(Path(self._config.resume))
        if checkpoint is not None:
            check_same_run(checkpoint, run=self._recipe.must_stay(self._config), zero_stage=self._config.zero_stage)
        return checkpoint

    def _find_policy(self) -> PolicyOrigin:
        model = find_policy(self._config, self._cache)
        # Hashing the weights is for one rank; what it finds, all have to know.
        origin = decided_by_first(lambda: check_policy(self._config, self._cache.identity, model))
        return replace(origin, model=model)

    def _prepare_hub(self, origin: PolicyOrigin) -> HubTarget | None:
        if not self._config.push_to_hub:
            return None
        if self._config.use_lora and not self._config.merge and origin.model.commit is None:
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
        if self._is_main:
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in _fields(self._config)}
            resolved = {"policy": origin.model.name, "policy_is_reference": origin.is_reference}
            write_json(
                self._config.output / "config.json",
                {"settings": settings, "resolved": {**resolved, **self._recipe.to_json()}},
            )

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _start_engine(self, origin: PolicyOrigin, checkpoint: Checkpoint | None) -> None:
        convert = checkpoint is not None and needs_conversion(checkpoint, num_ranks=self._ranks.num_ranks)
        engine_config = deepspeed_config(
            EngineSettings(
                zero_stage=self._config.zero_stage,
                dtype=self._recipe.dtype,
                max_grad_norm=self._config.max_grad_norm,
                num_ranks=self._ranks.num_ranks,
                hidden_size=load_config(origin.model.folder).get_text_config().hidden_size,
                on_gpu=self._device.type == "cuda",
                offload_optimizer=self._config.offload_optimizer,
                offload_parameters=self._config.offload_parameters,
                hierarchical_partition_size=self._config.zero_hpz_partition_size,
                load_universal=convert,
            )
        )
        policy = load_policy(self._config, self._recipe, origin.model, self._device, engine_config)
        self._engine = PolicyEngine(
            PairScorer(policy, load_balancing=self._config.load_balancing_loss),
            config=engine_config,
            loss=self._recipe.loss,
            weight_decay=self._config.weight_decay,
            bad_batch_path=self._config.output / "bad_batch.json",
            load_balancing_weight=self._config.resolved_load_balancing_weight() or 0.0,
        )
        all_or_none(self._check_free_space, on=self._is_main)
        layout = choose_layout(self._engine.deepspeed, device=self._device)
        if checkpoint is not None:
            self._load(checkpoint, convert)

        def micro_batches(mixture: Mixture) -> MicroBatches:
            return MicroBatches(
                self._cache,
                mixture,
                layout=layout,
                engine=self._engine,
                tokens_per_microbatch=self._recipe.tokens_per_microbatch,
            )

        self._loop = TrainingLoop(
            self._engine,
            self._recipe,
            micro_batches(self._mixture),
            micro_batches(self._eval_mixture) if self._eval_mixture else None,
        )

    def _check_free_space(self) -> None:
        """Before hours are spent on what could not be saved."""
        keep = self._config.keep_last_n_checkpoints
        check_free_space(
            self._config.output,
            parameters=self._engine.parameters(),
            weight_bytes=4 if self._recipe.dtype == "float32" else 2,
            keep_last=None if keep == -1 else keep,
            only_adapter=self._config.use_lora and not self._config.merge,
        )

    def _load(self, checkpoint: Checkpoint, convert: bool) -> None:
        if not convert:
            load_checkpoint(self._engine, checkpoint)
            return
        self._say(f"converting a checkpoint of {checkpoint.state.num_ranks} ranks for {self._ranks.num_ranks}")
        converted = self._checkpoints / "converted"

        def convert_afresh() -> None:
            shutil.rmtree(converted, ignore_errors=True)
            convert_checkpoint(checkpoint, converted)

        all_or_none(convert_afresh, on=self._is_main)
        load_checkpoint(self._engine, checkpoint, converted=converted)
        dist.barrier()  # all ranks have read it
        if self._is_main:
            shutil.rmtree(converted, ignore_errors=True)

    # ---- training ----------------------------------------------------------------------------------------------------

    def _train(self, origin: PolicyOrigin, checkpoint: Checkpoint | None) -> TrainReport:
        first_step = checkpoint.state.step if checkpoint else 0
        last_step = self._config.stop_after_steps or self._recipe.total_steps
        step_zero = self._prove_step_zero(origin) if checkpoint is None else None
        log = RunLog(
            self._config.output,
            is_main=self._is_main,
            last_step=first_step,
            progress=self._progress(first_step),
            tracking=self._tracking(checkpoint),
        )
        self._best = BestModel(self._config.output, by=self._config.keep_best, last_step=first_step)
        dist.barrier()  # all ranks have read what rank 0 is about to write
        eval_before = self._evaluate(log, 0) if checkpoint is None else None
        self._keep_best(origin, {}, eval_before)  # nothing is kept yet, but a loss without rewards is refused
        with stop_requests() as stop_requested:
            line = self._update_until_done(origin, log, range(first_step, last_step), stop_requested)
        updates_done = max(first_step, last_step)
        eval_after = self._evaluate(log, updates_done)
        is_finished = updates_done == self._recipe.total_steps
        if is_finished or self._evaluates_after(updates_done):
            self._keep_best(origin, line, eval_after)
        log.close()
        if is_finished:
            self._export(origin, self._config.output / "model", card=self._card(origin, line, eval_after))
        return self._report(step_zero, eval_before, eval_after, line, updates_done=updates_done)

    def _update_until_done(
        self, origin: PolicyOrigin, log: RunLog, steps: range, stop_requested: Callable[[], bool]
    ) -> dict[str, float]:
        """The updates ``steps``, counted from 0; the last logged line."""
        line: dict[str, float] = {}
        for step in steps:
            batch, grad_norm = self._loop.update(step)
            log.advance()
            done, is_last = step + 1, step + 1 == steps.stop
            if is_last or done % self._config.logging_steps == 0:
                line = self._loop.line(batch, grad_norm)
                log.write(line)
            if self._evaluates_after(done) and not is_last:
                self._keep_best(origin, line, self._evaluate(log, done))
            stop = any_rank(stop_requested(), self._device) and not is_last
            if stop or is_last or (self._config.checkpointing_steps and done % self._config.checkpointing_steps == 0):
                self._save(done, log)
            if stop:
                log.close()
                self._say(f"saved after update {done} of {self._recipe.total_steps}; --resume goes on from there")
                raise KeyboardInterrupt
        return line

    def _evaluates_after(self, updates_done: int) -> bool:
        return self._config.eval_steps is not None and updates_done % self._config.eval_steps == 0

    def _card(self, origin: PolicyOrigin, line: dict[str, float], evaluation: dict[str, float] | None) -> str:
        return model_card(
            self._config,
            self._recipe,
            name=self._config.resolved_run_name,
            base=origin.model,
            cache=self._cache,
            mixture=self._mixture,
            last_line=line,
            evaluation=evaluation,
        )

    def _export(self, origin: PolicyOrigin, folder: Path, *, card: str = "") -> None:
        """Save the policy, or the adapter that was trained on it."""
        model = origin.model
        if not self._config.use_lora or self._config.merge:
            export_model(self._engine, folder, base_folder=model.folder, card=card)
            return
        base = model.name if model.commit else str(model.folder)
        export_adapter(self._engine, folder, base_folder=model.folder, base=base, revision=model.commit, card=card)

    def _prove_step_zero(self, origin: PolicyOrigin) -> StepZeroFigures:
        figures = self._loop.prove_step_zero()
        if self._is_main:
            write_step_zero(self._config.output / "step0.json", figures)
        if origin.is_reference and not self._config.allow_numerics_mismatch:
            check_step_zero(figures)
        return figures

    def _evaluate(self, log: RunLog, updates_done: int) -> dict[str, float] | None:
        if self._eval_mixture is None:
            return None
        evaluation = self._loop.evaluate(updates_done)
        log.write(evaluation.line)
        if self._is_main and evaluation.margins is not None:
            write_eval_margins(
                self._config.output / EVAL_MARGINS,
                training_step=updates_done,
                keys=self._eval_mixture.table.column(KEY_COLUMN),
                margins=evaluation.margins,
            )
        return evaluation.line

    def _keep_best(self, origin: PolicyOrigin, line: dict[str, float], evaluation: dict[str, float] | None) -> None:
        if evaluation is None or not self._best.is_beaten_by(evaluation):
            return
        self._export(origin, self._config.output / "best", card=self._card(origin, line, evaluation))
        self._best.remember(evaluation, is_main=self._is_main)

    def _save(self, updates_done: int, log: RunLog) -> None:
        keep = self._config.keep_last_n_checkpoints
        save_checkpoint(
            self._engine,
            self._checkpoints,
            TrainerState(
                step=updates_done,
                num_ranks=self._ranks.num_ranks,
                zero_stage=self._config.zero_stage,
                run=self._recipe.must_stay(self._config),
                tracking_run_id=log.tracking_run_id,
            ),
            keep_last=None if keep == -1 else keep,
        )

    def _progress(self, first_step: int) -> Progress | None:
        if not self._is_main:
            return None
        return Progress(
            self._recipe.total_steps, unit="step", title="train", done_before=first_step, notes_hold_rate=True
        )

    def _tracking(self, checkpoint: Checkpoint | None) -> TrackingSettings | None:
        if not self._config.with_tracking:
            return None
        return TrackingSettings(
            project=self._config.wandb_project,
            entity=self._config.wandb_entity,
            name=self._config.resolved_run_name,
            run_id=checkpoint.state.tracking_run_id if checkpoint else None,
            config=self._recipe.to_json(),
        )

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
            reference_forwards=0,
            step0=asdict(step_zero) if step_zero else self._recorded_step_zero(),
            eval_before=eval_before,
            eval_after=eval_after,
            last=last_line,
        )
        if self._is_main:
            report.write()
        return report

    def _recorded_step_zero(self) -> dict[str, Any] | None:
        """The proof of a resumed run was made when it began."""
        recorded = self._config.output / "step0.json"
        return json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else None

    @property
    def _checkpoints(self) -> Path:
        return self._config.output / "checkpoints"

    def _say(self, message: str) -> None:
        if self._is_main:
            click.echo(message, err=True)


def _fields(config: TrainConfig) -> list[tuple[str, object]]:
    return list(asdict(config).items())

"""One training run, as one of its ranks sees it: prepare, start, prove, train, save."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...pipeline.training.host_group import wait_for_all
from ...pipeline.training.run_log import RunLog, TrackingSettings
from ..console.progress import Progress
from ..hub.hub_model import HubTarget
from ..processes.devices import gpu_explained
from ..processes.ranks import Ranks
from ..processes.stop_request import stop_requests
from .best_model import BestModel
from .output_folder import TRIAL_MODEL
from .prepared_run import PreparedRun, prepare_run, prepare_upload, write_config
from .started_run import StartedRun, start_run
from .step_zero_proof import prove_step_zero
from .train_config import TrainConfig
from .train_dry_run import DryRunReport
from .train_report import TrainReport
from .training_updates import TrainingUpdates

LESS_MEMORY = (
    "--gradient-checkpointing, a smaller --tokens-per-microbatch, more GPUs at --zero-stage 3, --offload-optimizer, or "
    "--use-lora; --dry-run measures each"
)
STOPPING = (
    "stopping: a checkpoint is saved after this update, or this batch of an evaluation; Ctrl-C again stops at once, "
    "without one"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRun:
    """A run that has come to its end, or to where ``--stop-after-steps`` said.

    Attributes:
        report: Its results.
        hub_target: Where its model is to be uploaded; None on ranks that do not upload.
    """

    report: TrainReport
    hub_target: HubTarget | None


@gpu_explained(LESS_MEMORY)
def run_training(config: TrainConfig, ranks: Ranks, device: torch.device, cache_folder: Path) -> TrainedRun:
    """Train from the settings to the model, or until asked to stop.

    Args:
        config: The settings.
        ranks: Which rank of how many this is; the process group stands.
        device: This rank's device.
        cache_folder: Where the cache lies on this machine.

    Raises:
        DpoCacheError: On all ranks alike.
        KeyboardInterrupt: Asked to stop; a checkpoint was saved.
    """
    began = time.monotonic()
    with ExitStack() as held:
        run = prepare_run(config, ranks, device, cache_folder, held)
        checkpoint = run.checkpoints.find()
        hub_target = prepare_upload(run)
        write_config(run)
        started = start_run(run, checkpoint)
        report = _train(run, started, began, held)
    return TrainedRun(report=report, hub_target=hub_target)


@gpu_explained(LESS_MEMORY)
def run_dry(config: TrainConfig, ranks: Ranks, device: torch.device, cache_folder: Path) -> DryRunReport:
    """The heaviest global batches with learning rate 0, and one save; nothing is trained or kept.

    Args:
        config, ranks, device, cache_folder: As for :func:`run_training`.

    Raises:
        DpoCacheError: On all ranks alike.
    """
    with ExitStack() as held:
        run = prepare_run(config, ranks, device, cache_folder, held)
        started = start_run(run, None)
        seconds_per_step = started.loop.time_heaviest_batches()
        trial = config.output / TRIAL_MODEL
        saving = time.monotonic()
        started.models.write(trial, {}, None)
        report = DryRunReport(
            seconds_per_step=seconds_per_step,
            hours=seconds_per_step * run.recipe.total_steps / 3600,
            seconds_per_save=time.monotonic() - saving,
            peak_memory_gib=started.loop.peak_memory_gib(),
            steps=run.recipe.total_steps,
        )
        if run.is_main:
            shutil.rmtree(trial, ignore_errors=True)
            report.write(config.output)
        return report


def _train(run: PreparedRun, started: StartedRun, began: float, held: ExitStack) -> TrainReport:
    step_zero = prove_step_zero(run, started)
    if step_zero:
        started.loop.set_tie_margin(step_zero.tie_margin(policy_is_reference=run.origin.is_reference))
    if started.checkpoint is not None and started.checkpoint.state.unlogged:
        started.loop.restore_sums(started.checkpoint.state.unlogged)
    run.checkpoints.remove_later(started.first_step)
    log = _open_log(run, started, held)
    best = BestModel(run.config.output, by=run.config.keep_best, last_step=started.first_step)
    wait_for_all()  # all ranks have read what rank 0 is about to write
    updates = TrainingUpdates(run, started, log, best)
    eval_before = updates.evaluate_before()
    with stop_requests(notice=STOPPING if run.is_main else None) as stop_requested:
        last_line = updates.carry_out(stop_requested)
    eval_after = updates.evaluate_after()
    updates.save_model(last_line, eval_after)
    report = TrainReport(
        output=str(run.config.output),
        steps=updates.updates_done,
        total_steps=run.recipe.total_steps,
        pairs=started.loop.pairs_after(updates.updates_done),
        seconds=time.monotonic() - began,
        step0=asdict(step_zero) if step_zero else None,
        eval_before=eval_before,
        eval_after=eval_after,
        last=last_line,
        best=best.kept,
    )
    if run.is_main:
        report.write()
    log.close()  # last: without a network a tracker may wait for hours, and no file of the run is to wait for it
    return report


def _open_log(run: PreparedRun, started: StartedRun, held: ExitStack) -> RunLog:
    config = run.config
    progress = tracking = None
    if run.is_main:
        bar = Progress(
            run.recipe.total_steps,
            unit="step",
            title="train",
            done_before=started.first_step,
            notes_hold_rate=True,
        )
        progress = held.enter_context(bar)  # closed before a fault is told, which would stand behind it
    if config.with_tracking:
        tracking = TrackingSettings(
            project=config.wandb_project,
            entity=config.wandb_entity,
            tags=config.wandb_tags,
            name=config.resolved_run_name,
            run_id=started.checkpoint.state.tracking_run_id if started.checkpoint else None,
            config=run.recipe.to_json(),
        )
    return RunLog(
        config.output,
        is_main=run.is_main,
        last_step=started.first_step,
        progress=progress,
        tracking=tracking,
        tensorboard=config.with_tensorboard,
    )

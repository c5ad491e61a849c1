"""Stage two: DPO from a cache, on DeepSpeed. There is no code here, or below, that computes a reference.

Started alone, this process starts one rank for each GPU and waits; under torchrun, the deepspeed launcher or srun it
is one of the ranks itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..pipeline.cache.cache_folder import ReferenceCache
from .addresses.local_copy import glance, local_copy
from .console.library_output import quiet_libraries
from .hub.hub_model import HubTarget, upload_model
from .processes.child_processes import is_child, python_command, run_children, threads_for
from .processes.devices import num_processes
from .processes.ranks import Ranks, ranks_from_environment
from .processes.rendezvous import hosted_rendezvous
from .setting import command_line_of
from .training.recipe import resolve_recipe
from .training.train_config import TrainConfig
from .training.train_dry_run import DryRunReport
from .training.train_plan import TrainPlan, plan_of
from .training.train_report import TrainReport

SAVING_GRACE_S = 600.0
"""How long ranks that are asked to stop may take to finish their step and save."""


def train(config: TrainConfig) -> TrainReport | DryRunReport | TrainPlan | None:
    """Run stage two.

    Returns:
        The finished run; what was measured with ``--dry-run``; what would be run with ``--plan``; None on ranks
        that do not report.

    Raises:
        DpoCacheError: A fault of the settings, the cache, the model or the machine.
        KeyboardInterrupt: Asked to stop; a checkpoint was saved.
    """
    quiet_libraries()
    ranks = ranks_from_environment()
    if config.plan:  # perhaps for another machine than this one
        return _plan(config, ranks.num_ranks if ranks else config.num_gpus or max(1, torch.cuda.device_count()))
    num_ranks = num_processes(config.num_gpus, ranks, flag="--num-gpus")
    if ranks is not None:
        return _train_rank(config, ranks)
    if num_ranks == 1:
        return _train_rank(config, Ranks(rank=0, num_ranks=1, rank_of_node=0, ranks_per_node=1))
    return _train_in_children(config, num_ranks)


def _plan(config: TrainConfig, num_ranks: int) -> TrainPlan:
    with glance(config.cache, _mixture_names(config), first_rows=0) as folder:
        cache = ReferenceCache.open(folder)
        mixture = cache.read_mixture(config.mixture)
        evaluation = cache.read_mixture(config.eval_mixture) if config.eval_mixture else None
        recipe = resolve_recipe(config, cache, mixture, num_ranks=num_ranks)
        return plan_of(config, recipe, cache, mixture, evaluation)


def _cache_folder(config: TrainConfig) -> Path:
    return local_copy(config.cache, _mixture_names(config))


def _mixture_names(config: TrainConfig) -> list[str]:
    return [config.mixture, *([config.eval_mixture] if config.eval_mixture else [])]


def _train_in_children(config: TrainConfig, num_ranks: int) -> TrainReport | DryRunReport:
    """One child a rank; this process waits, passes on what it is asked, and reports."""
    _cache_folder(config)  # the ranks find there what is fetched once, with one bar
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    with hosted_rendezvous() as rendezvous:
        shared = {**rendezvous, **sizes, **threads_for(num_ranks)}
        run_children(
            [python_command("train", *command_line_of(config))] * num_ranks,
            [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)],
            grace_s=SAVING_GRACE_S,
        )
    return DryRunReport.read(config.output) if config.dry_run else TrainReport.read(config.output)


def _train_rank(config: TrainConfig, ranks: Ranks) -> TrainReport | DryRunReport | None:
    from .processes.process_group import process_group  # only now: it imports DeepSpeed
    from .training.training_run import run_dry, run_training

    cache_folder = _cache_folder(config)  # before the ranks meet: the wait for a long copy has no limit here
    with process_group(ranks) as device:
        if config.dry_run:
            measured = run_dry(config, ranks, device, cache_folder)
            return measured if _reports(ranks) else None
        trained = run_training(config, ranks, device, cache_folder)
    report = trained.report
    if trained.hub_target is not None and report.is_finished:
        report = _upload(trained.hub_target, report)  # the ranks have parted: no one waits for it
    return report if _reports(ranks) else None


def _reports(ranks: Ranks) -> bool:
    """A rank that this command started leaves it to the process that waits for all."""
    return ranks.rank == 0 and not is_child()


def _upload(target: HubTarget, report: TrainReport) -> TrainReport:
    steps = f"{report.steps} updates on {report.pairs} pairs"
    uploaded = replace(report, hub=upload_model(target, Path(report.output) / "model", message=f"DPO: {steps}"))
    uploaded.write()
    return uploaded

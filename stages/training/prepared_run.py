"""What a run has before its model is loaded: its folder, the open cache, every number, and the policy's files."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.training.tensorboard_files import require_tensorboard
from ..console.terminal import say
from ..hub.hub_model import HubTarget, prepare_hub_target
from ..processes.process_group import all_or_none, decided_by_first, refuse_other_settings
from ..processes.ranks import Ranks
from .output_folder import output_lock, refuse_other_folder, refuse_overwriting, refuse_unshared
from .policy import PolicyOrigin, check_policy, find_policy
from .recipe import Recipe, resolve_recipe
from .run_checkpoints import RunCheckpoints
from .run_config import write_run_config
from .train_config import TrainConfig
from .train_plan import plan_of
from .training_cache import TrainingCache, training_cache

PATHS_OF_A_MACHINE = {"cache", "model"}
"""Settings that may differ between the machines of a run: what is found there is compared by its digests."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedRun:
    """A run whose settings, cache and policy fit together; the same on all ranks but for the first three.

    Attributes:
        config: The settings.
        ranks: Which rank of how many this is.
        device: This rank's device.
        pairs: The open cache and what is read of it.
        recipe: The resolved numbers.
        origin: What the policy starts from.
        checkpoints: Those of this run, on disk.
    """

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    pairs: TrainingCache
    recipe: Recipe
    origin: PolicyOrigin
    checkpoints: RunCheckpoints

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.ranks.rank == 0


def prepare_run(
    config: TrainConfig, ranks: Ranks, device: torch.device, cache_folder: Path, held: ExitStack
) -> PreparedRun:
    """Claim the output folder, open the cache and find the policy; collective.

    Args:
        config: The settings.
        ranks: Which rank of how many this is.
        device: This rank's device.
        cache_folder: Where the cache lies on this machine.
        held: Keeps the folder and the cache until the run ends.

    Raises:
        DpoCacheError: Something does not fit; on all ranks alike.
    """
    pairs, recipe = _open_pairs(config, ranks, cache_folder, held)
    origin = _find_policy(config, pairs.cache)
    return PreparedRun(
        config=config,
        ranks=ranks,
        device=device,
        pairs=pairs,
        recipe=recipe,
        origin=origin,
        checkpoints=RunCheckpoints(config, recipe, ranks, policy_sha256=origin.sha256),
    )


def prepare_upload(run: PreparedRun) -> HubTarget | None:
    """Where the model will be uploaded, as rank 0 knows it; None on other ranks and without ``--push-to-hub``.

    Raises:
        DpoCacheError: It could not be uploaded; on all ranks alike.
    """
    return all_or_none(lambda: _hub_target(run), on=run.is_main)


def write_config(run: PreparedRun) -> None:
    """Leave settings and resolved numbers in ``config.json`` of the run's folder."""
    if run.is_main:
        write_run_config(run.config, run.recipe, run.origin, fingerprint=run.checkpoints.fingerprint)


def _open_pairs(config: TrainConfig, ranks: Ranks, cache_folder: Path, held: ExitStack) -> tuple[TrainingCache, Recipe]:
    is_main = ranks.rank == 0
    settings = asdict(config)
    refuse_other_settings({name: value for name, value in settings.items() if name not in PATHS_OF_A_MACHINE})
    all_or_none(require_tensorboard, on=is_main and config.with_tensorboard)
    holder = decided_by_first(lambda: _claim_output(config, held))
    all_or_none(lambda: refuse_unshared(config.output, holder))
    pairs = held.enter_context(training_cache(config, cache_folder, ranks))
    recipe = resolve_recipe(config, pairs.cache, pairs.mixture, num_ranks=ranks.num_ranks)
    if is_main:
        say(plan_of(config, recipe, pairs.cache, pairs.mixture, pairs.eval_mixture).summary())
    return pairs, recipe


def _claim_output(config: TrainConfig, held: ExitStack) -> str:
    refuse_other_folder(config.output)
    if config.resume is None:
        refuse_overwriting(config.output)
    return held.enter_context(output_lock(config.output))


def _find_policy(config: TrainConfig, cache: ReferenceCache) -> PolicyOrigin:
    model = all_or_none(lambda: find_policy(config, cache))
    assert model is not None
    # Hashing the weights is for one rank; what it finds, all have to know.
    origin = decided_by_first(lambda: check_policy(config, cache.identity, model))
    return replace(origin, model=model)


def _hub_target(run: PreparedRun) -> HubTarget | None:
    config, model = run.config, run.origin.model
    if not config.push_to_hub:
        return None
    if config.saves_adapter and model.commit is None:
        raise DpoCacheError(
            f"--push-to-hub: an adapter names the model it belongs on, and {model.name} is a folder here",
            expected="a model of the Hub under the adapter",
            next_step="add --merge to upload a whole model, or train from a Hub id: --model OWNER/NAME",
        )
    return prepare_hub_target(
        config.hub_model_id, branch=config.hub_revision or config.resolved_run_name, private=config.hub_private
    )

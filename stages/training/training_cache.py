"""The pairs of a run: its cache and mixtures, opened by every rank and checked once a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import DpoCacheError
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.mixture_check import check_common_values, check_mixture
from ..processes.process_group import all_or_none, decided_by_first
from ..processes.ranks import Ranks
from .train_config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingCache:
    """An open cache and what a run reads of it.

    Attributes:
        cache: The cache.
        mixture: The pairs to train on.
        eval_mixture: Held-out pairs; None without ``--eval-mixture``.
    """

    cache: ReferenceCache
    mixture: Mixture
    eval_mixture: Mixture | None


@contextmanager
def training_cache(config: TrainConfig, folder: Path, ranks: Ranks) -> Iterator[TrainingCache]:
    """Open cache and mixtures; one rank a node keeps others from deleting and looks at every row first.

    Args:
        config: The settings.
        folder: Where the cache lies on this machine.
        ranks: Which rank of how many this is.

    Raises:
        DpoCacheError: Something is missing or damaged, or another rank reads other pairs; on all ranks alike.
    """
    with ExitStack() as held:

        def hold_and_check() -> None:
            held.enter_context(ReferenceCache.open(folder).training())
            opened = _open(config, folder)
            for mixture in _mixtures_of(opened):
                check_mixture(opened.cache, mixture)
                if config.resolved_objective().ld_alpha != 1:
                    check_common_values(opened.cache, mixture)

        all_or_none(hold_and_check, on=ranks.rank_of_node == 0)
        opened = _open(config, folder)
        digests = [mixture.digest for mixture in _mixtures_of(opened)]
        first = decided_by_first(lambda: digests)
        all_or_none(lambda: _refuse_other_mixtures(digests, first, f"rank {ranks.rank} reads from {config.cache}"))
        yield opened


def _open(config: TrainConfig, folder: Path) -> TrainingCache:
    cache = ReferenceCache.open(folder)
    return TrainingCache(
        cache=cache,
        mixture=cache.read_mixture(config.mixture),
        eval_mixture=cache.read_mixture(config.eval_mixture) if config.eval_mixture else None,
    )


def _mixtures_of(opened: TrainingCache) -> list[Mixture]:
    return [mixture for mixture in (opened.mixture, opened.eval_mixture) if mixture is not None]


def _refuse_other_mixtures(digests: list[str], first: list[str], reader: str) -> None:
    """Where each machine has a copy of its own, they may differ; the ranks would then train on different pairs."""
    if digests != first:
        raise DpoCacheError(
            f"the mixture that {reader} is not that of rank 0",
            expected="the same cache on all machines",
            next_step="start again, if it was being changed; else compare dpo-cache info on each machine",
        )

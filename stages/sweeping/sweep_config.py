"""The settings of ``dpo-sweep``: how the points of a grid are trained. The points are in the grid's file."""

from __future__ import annotations

from dataclasses import dataclass

from ..setting import check_settings, refuse_ignored, setting

DEFAULT_HALVING_FACTOR = 2.0
DEFAULT_RUNGS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """Which points are trained to the end, and how many at a time."""

    strategy: str = setting(
        "grid",
        help="grid: train every point to the end. halving: give up the worse points early, judged on held-out pairs.",
        choices=("grid", "halving"),
    )
    halving_by: str | None = setting(
        None,
        help="Held-out figure that decides which points go on.",
        default_text="accuracy; margin if all points share loss and beta",
        choices=("margin", "accuracy"),
    )
    halving_factor: float | None = setting(
        None,
        help="One in this many points goes on, with this many times the updates.",
        default_text=f"{DEFAULT_HALVING_FACTOR:g}",
        above=1,
    )
    rungs: int | None = setting(
        None,
        help="How many times points are compared, including at the end.",
        default_text=str(DEFAULT_RUNGS),
        minimum=2,
    )
    gpus_per_run: int | None = setting(
        None,
        help="GPUs per run; as many runs as fit are trained in parallel.",
        default_text="all GPUs, one run after another",
        minimum=1,
    )
    parallel: int | None = setting(None, help="Runs to train in parallel on a CPU.", default_text="1", minimum=1)
    plan: bool = setting(False, help="Check everything and print the commands of all builds and points; start nothing.")

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_ignored(
            self,
            *("halving_by", "halving_factor", "rungs"),
            without="--strategy halving",
            is_given=self.strategy == "halving",
        )

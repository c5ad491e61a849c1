"""One point of a sweep on the disk: how far its run has got, and how well it does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from ...pipeline.report.run_record import Line, logged_line, metrics_lines
from ...pipeline.training.run_file import read_run_json
from ...pipeline.training.same_run import changed_values
from ..training.recipe import Recipe, fixed_numbers
from ..training.train_report import FILE as SUMMARY
from ..training.train_report import TrainReport
from .sweep_grid import SweepPoint

FIXED_BESIDE_THE_NUMBERS = {
    *("model", "model_revision", "eval_mixture"),
    *("merge", "keep_best", "model_saving_steps", "push_to_hub", "hub_model_id", "hub_revision"),
}
"""Settings that the numbers of a run do not show, and that would be ignored for a finished point: where its policy
starts, what it is judged by, and what is kept of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The rewards of a run at some update; a figure that an objective does not have, or that is not finite, is None.
    Where the margin is not finite, the accuracy is None too: such a run has diverged.

    Attributes:
        accuracy: Share of the pairs whose chosen response has the higher reward.
        margin: Mean reward of the chosen responses less that of the rejected ones.
        separation: The margin divided by beta, in nats or nats per token. It breaks ties of the accuracy, which the
            margin itself must not do: it grows with beta.
    """

    accuracy: float | None
    margin: float | None
    separation: float | None

    def key(self, by: str = "accuracy") -> tuple[float, float]:
        """Sorts runs, best last: by accuracy, then separation; or by margin, then accuracy."""
        accuracy, margin, separation = (
            -math.inf if figure is None else figure for figure in (self.accuracy, self.margin, self.separation)
        )
        return (accuracy, separation) if by == "accuracy" else (margin, accuracy)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """A point with the numbers of its run.

    Attributes:
        point: The point.
        recipe: What its options come to, with this cache.
    """

    point: SweepPoint
    recipe: Recipe

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.point.config.output

    def report(self) -> TrainReport | None:
        """What the run came to; None before it has stopped as it was told to."""
        return TrainReport.read(self.folder) if (self.folder / SUMMARY).exists() else None

    def has_reached(self, step: int) -> bool:
        """Whether nothing is left to do up to update ``step``."""
        report = self.report()
        return report is not None and report.steps >= step

    def steps_done(self) -> int:
        """Updates that are known to be done."""
        report = self.report()
        logged = [int(line["training_step"]) for line in self._logged()]
        return max([report.steps if report else 0, *logged])

    def step_zero_loss(self) -> float | None:
        """Loss before the first update; None before it was measured, and where it was not finite."""
        proof = self.folder / "step0.json"
        loss: float | None = read_run_json(proof)["loss"] if proof.exists() else None
        return loss

    def has_begun(self) -> bool:
        """Whether there is anything to resume from."""
        return (self.folder / SUMMARY).exists() or any((self.folder / "checkpoints").glob("step_*"))

    def held_out_score(self, step: int) -> Score | None:
        """The evaluation after update ``step``, the same one however far the run has come since.

        None where there is none: a run that was begun with other rungs went past this update without one.
        """
        line = logged_line(self.folder, step, "eval/loss")
        return self._score(line, "eval/") if line else None

    def last_score(self, *, held_out: bool) -> Score:
        """The last evaluation; or the last logged updates, each of whose pairs was scored before it was trained on."""
        field = "eval/loss" if held_out else "train_loss"
        lines = [line for line in self._logged() if field in line]
        return self._score(lines[-1] if lines else {}, "eval/" if held_out else "")

    def _score(self, line: Line, prefix: str) -> Score:
        margin = _finite(line.get(f"{prefix}rewards/margin"))
        return Score(
            accuracy=None if margin is None else _finite(line.get(f"{prefix}rewards/accuracy")),
            margin=margin,
            separation=None if margin is None else margin / self.recipe.objective.lead.beta,
        )

    def refuse_other_settings(self) -> None:
        """Refuse to count or to resume a run of the same name that was begun with other settings.

        Raises:
            DpoCacheError: Naming each setting that differs.
        """
        recorded = self.folder / "config.json"
        if not self.has_begun() or not recorded.exists():
            return
        config = read_run_json(recorded)
        different = changed_values(
            self._compared(config["settings"], config["resolved"]),
            self._compared(asdict(self.point.config), self.recipe.to_json()),
        )
        if different:
            raise DpoCacheError(
                f"{self.folder} holds a run with other settings: {'; '.join(different)}",
                expected="the settings it was begun with",
                next_step="give the sweep another output, or remove that folder to train the point again",
            )

    def _compared(self, settings: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
        """What has to be the same: all that the results depend on, and for a run to resume what a checkpoint fixes."""
        compared = {**fixed_numbers(numbers), **{name: settings.get(name) for name in FIXED_BESIDE_THE_NUMBERS}}
        if not self.has_reached(self.recipe.total_steps):
            compared["zero_stage"] = numbers.get("zero_stage")
        return compared

    def _logged(self) -> list[Line]:
        lines, _ = metrics_lines(self.folder)
        return lines


def _finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None

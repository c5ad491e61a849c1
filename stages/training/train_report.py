"""The results of a run, for people and for programs: ``summary.json`` of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ...pipeline.training.run_file import read_run_json, write_run_json
from ..console.counted_noun import counted
from ..console.next_command import report_command
from ..hub.hub_model import HubUpload
from .best_model import FIELDS

FILE = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """A run that is finished, or that ended where ``--stop-after-steps`` said.

    Attributes:
        output: The run's folder.
        steps: Updates done.
        total_steps: Updates of the whole run.
        pairs: Training pairs that went into them, by this process and those it resumed from.
        seconds: Wall time of this process.
        step0: How far policy and cache were apart before the first update.
        eval_before: Evaluation before the first update, where there is one.
        eval_after: Evaluation after the last.
        last: The last logged line. A figure that is not finite is None where a line was read from the disk.
        best: With ``--keep-best``, what ``best.json`` says of the model in ``best/``; None where none is kept.
        hub: The result of ``--push-to-hub``; None without it.
    """

    output: str
    steps: int
    total_steps: int
    pairs: int
    seconds: float
    step0: dict[str, Any] | None
    eval_before: Mapping[str, float | None] | None
    eval_after: Mapping[str, float | None] | None
    last: Mapping[str, float | None]
    best: dict[str, Any] | None = None
    hub: HubUpload | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing of the run is left to do; then there is a model."""
        return self.steps == self.total_steps

    def write(self) -> None:
        """Keep it in the run's folder."""
        write_run_json(Path(self.output) / FILE, asdict(self))

    @classmethod
    def read(cls, output: Path) -> TrainReport:
        """Read what :meth:`write` wrote."""
        fields = read_run_json(output / FILE)
        hub = fields.pop("hub")
        return cls(**fields, hub=HubUpload(**hub) if hub else None)

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def summary(self) -> str:
        """The closing lines on a terminal."""
        lines = [
            f"trained {counted(self.steps, 'update')} on {counted(self.pairs, 'pair')}; "
            f"this process took {self.seconds:.0f} s"
        ]
        if self.step0:
            lines.append(
                f"step 0: loss {_shown(self.step0['loss'], '.6f')}, policy and cache differ by at most "
                f"{_shown(self.step0['max_per_token'], '.2g')} nats per token"
            )
        before, after = self.eval_before or {}, self.eval_after or {}
        accuracy, margin = FIELDS["accuracy"], FIELDS["margin"]
        if all(name in line for name in (accuracy, margin) for line in (before, after)):
            accuracies = f"{_shown(before[accuracy], '.1%')} before, {_shown(after[accuracy], '.1%')} after"
            lines.append(f"held out: reward accuracy {accuracies}, margin {_shown(after[margin], '.3g')}")
        if self.is_finished:
            lines.append(f"model: {self.output}/model")
        else:
            lines.append(f"stopped after {self.steps} of {self.total_steps} updates; --resume continues from there")
        if self.best:
            update, value = self.best["training_step"], self.best["value"]
            figure = f"accuracy {value:.1%}" if self.best["field"] == accuracy else f"margin {value:.3g}"
            lines.append(f"best model: {self.output}/best, after update {update}: held-out reward {figure}")
        if self.hub:
            lines.append(self.hub.summary())
        lines.append(report_command(self.output))
        diverged = [name for name, value in after.items() if not _is_finite(value)]
        if diverged:
            some = ", ".join(diverged[:2]) + (", …" if len(diverged) > 2 else "")
            lines.append(
                f"warning: the last evaluation has figures that are not finite ({some}), so the policy has diverged; "
                "train again with a lower --learning-rate"
            )
        return "\n".join(lines)


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _shown(value: float | None, form: str) -> str:
    return format(value, form) if _is_finite(value) else "not finite"

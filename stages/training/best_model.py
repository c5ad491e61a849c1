"""The best model so far by the held-out pairs, kept in ``best/`` of a run's folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...pipeline.training.run_file import read_run_json, write_run_json

FILE = "best.json"
FIELDS = {"accuracy": "eval/rewards/accuracy", "margin": "eval/rewards/margin"}


class BestModel:
    """Remembers the best evaluation of a run, also of the part before a resume.

    Args:
        output: The run's folder.
        by: ``accuracy`` or ``margin``; None to keep no best model.
        last_step: Updates done when this process starts; what was evaluated later comes again.
    """

    def __init__(self, output: Path, *, by: str | None, last_step: int) -> None:
        self._path = output / FILE
        self._field = FIELDS[by] if by else None
        self._kept: dict[str, Any] | None = None
        if self._path.exists():
            record = read_run_json(self._path)
            if record["training_step"] <= last_step and record["field"] == self._field:
                self._kept = record

    @property
    def kept(self) -> dict[str, Any] | None:
        """What ``best.json`` says of the model in ``best/``: field, value and update; None while there is none."""
        return self._kept

    def is_beaten_by(self, line: dict[str, float]) -> bool:
        """Whether an evaluation after at least one update is better than all before; the first of equals stays."""
        if self._field is None or line["training_step"] == 0:
            return False
        value = line[self._field]
        return math.isfinite(value) and (self._kept is None or value > self._kept["value"])

    def remember(self, line: dict[str, float], *, is_main: bool) -> None:
        """This evaluation's model has been saved."""
        assert self._field is not None
        self._kept = {"field": self._field, "value": line[self._field], "training_step": line["training_step"]}
        if is_main:
            write_run_json(self._path, self._kept)

"""What a dry run measured, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...pipeline.training.run_file import read_run_json, write_run_json
from ..console.counted_noun import counted

FILE = "dry-run.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunReport:
    """Measured on the heaviest global batches.

    Attributes:
        seconds_per_step: The slowest global batch: forward, backward and update.
        hours: What the whole run would take if every batch were as heavy.
        seconds_per_save: Writing the model once.
        peak_memory_gib: The most memory any rank held, on its GPU, or in all on a CPU.
        steps: Updates of the run.
    """

    seconds_per_step: float
    hours: float
    seconds_per_save: float
    peak_memory_gib: float
    steps: int

    def write(self, output: Path) -> None:
        """Leave it in the run's folder, where a run may still begin."""
        write_run_json(output / FILE, asdict(self))

    @classmethod
    def read(cls, output: Path) -> DryRunReport:
        """Read what :meth:`write` wrote."""
        return cls(**read_run_json(output / FILE))

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def summary(self) -> str:
        """The closing lines on a terminal."""
        updates, hours = counted(self.steps, "such update"), self.hours
        whole_run = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        return (
            f"the heaviest global batch takes {self.seconds_per_step:.1f} s; {updates} would take {whole_run}\n"
            f"peak memory {self.peak_memory_gib:.2f} GiB per rank; saving the model takes "
            f"{self.seconds_per_save:.1f} s\n"
            "nothing was trained; the same command without --dry-run starts the run"
        )

"""Where the lines of a run go: ``metrics.jsonl`` always, Weights & Biases when asked, and what people watch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ...errors import DpoCacheError
from ..cache.durable_file import write_durably
from ..finite_json import finite_json
from .tensorboard_files import TensorBoardFiles

logger = logging.getLogger(__name__)

Line = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingSettings:
    """A run at Weights & Biases.

    Attributes:
        project, entity, name, tags: As Weights & Biases knows them.
        run_id: A run to continue, from the checkpoint resumed from; None for a new one.
        config: The resolved configuration, shown beside the curves.
    """

    project: str
    config: Mapping[str, Any]
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    run_id: str | None = None


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, on disk before the next step starts.

    A line that a kill cut short is dropped when the file is opened again; so are the lines of steps that a resumed
    run will do once more.

    Args:
        path: The file; made where it is missing.
        last_step: The step of the checkpoint resumed from; 0 for a fresh run.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        self.path = path
        kept, dropped = _lines_until(path, last_step) if path.exists() else ([], 0)
        if dropped:
            logger.warning("%s: dropped %d lines that are torn or past step %d", path, dropped, last_step)
            write_durably(path, b"".join(kept), temporary_folder=path.parent)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append one line; a number that is not finite is written as null.

        Raises:
            DpoCacheError: The operating system refused.
        """
        try:
            self._file.write(finite_json(line) + "\n")
            self._file.flush()
        except OSError as error:  # which does not name the file
            raise DpoCacheError(
                f"{self.path} cannot be written: {error.strerror}",
                next_step="free some space (df -h), then run the same command with --resume",
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_until(path: Path, last_step: int) -> tuple[list[bytes], int]:
    """The whole lines up to a step, and how many lines are left out; none are kept for a fresh start."""
    kept: list[bytes] = []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines if last_step else []:
        step = _step_of(line)
        if not line.endswith(b"\n") or step is None or step > last_step:
            break
        kept.append(line)
    return kept, len(lines) - len(kept)


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["training_step"])
    except (ValueError, KeyError, TypeError):
        return None


class Tracking:
    """A run at Weights & Biases that can fail in every way without the training noticing.

    Args:
        settings: What to call the run.
        folder: Where its local files go.

    Attributes:
        run_id: Kept in checkpoints, so that a resumed run continues its curve, also where tracking failed meanwhile;
            None for a run that Weights & Biases has never known.
    """

    def __init__(self, settings: TrackingSettings, *, folder: Path) -> None:
        self.run_id = settings.run_id
        self._run: Any = None
        for mode in (None, "offline"):
            try:
                import wandb

                self._run = wandb.init(
                    project=settings.project,
                    entity=settings.entity,
                    name=settings.name,
                    tags=settings.tags or None,
                    config=dict(settings.config),
                    id=settings.run_id,
                    resume="allow" if settings.run_id else None,
                    dir=str(folder),
                    mode=mode,
                    settings={"quiet": True},  # the link stays; curves as text would follow our own summary
                )
                self.run_id = str(self._run.id)
                return
            except Exception as error:  # whatever goes wrong with tracking, training goes on
                logger.warning("wandb did not start%s: %s", " offline" if mode else ", trying offline", error)

    def write(self, line: Line) -> None:
        """Log one line under its step; the first failure ends the tracking, not the run."""
        if self._run is None:
            return
        try:
            self._run.log(dict(line), step=int(line["training_step"]))
        except Exception as error:  # as above
            logger.warning("wandb stopped: %s; metrics.jsonl goes on", error)
            self._run = None

    def close(self) -> None:
        """Finish the run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as above
            logger.warning("wandb did not finish: %s", error)


class ProgressBar(Protocol):
    """What people watch."""

    def reach(self, done: int, **notes: object) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """All of them together. On ranks other than 0 it does nothing.

    Args:
        output: The run's folder.
        is_main: Rank 0.
        last_step: The step resumed from, 0 for a fresh run.
        progress: Of the updates; None where nobody watches.
        tracking: None for no tracking.
        tensorboard: Whether event files are written to ``tensorboard/`` of the folder.
    """

    def __init__(
        self,
        output: Path,
        *,
        is_main: bool,
        last_step: int = 0,
        progress: ProgressBar | None = None,
        tracking: TrackingSettings | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._file = MetricsFile(output / "metrics.jsonl", last_step=last_step) if is_main else None
        self._tracking = Tracking(tracking, folder=output) if is_main and tracking else None
        events = output / "tensorboard"
        self._events = TensorBoardFiles(events, last_step=last_step) if is_main and tensorboard else None
        self._progress = progress
        self._done = last_step

    @property
    def tracking_run_id(self) -> str | None:
        """The run's id at Weights & Biases; None without tracking and on other ranks."""
        return self._tracking.run_id if self._tracking else None

    def advance(self) -> None:
        """One more step is done, logged or not."""
        self._done += 1
        if self._progress is not None:
            self._progress.reach(self._done)

    def write(self, line: Line) -> None:
        """Log one line everywhere."""
        if self._file is None:
            return
        self._file.write(line)
        for tracker in (self._tracking, self._events):
            if tracker is not None:
                tracker.write(line)
        if self._progress is not None and "train_loss" in line:
            self._progress.reach(self._done, **_at_a_glance(line))

    def close(self) -> None:
        """Close all of them."""
        for sink in (self._file, self._tracking, self._events, self._progress):
            if sink is not None:
                sink.close()


def _at_a_glance(line: Line) -> dict[str, str]:
    """What is worth watching, the most telling first: a narrow terminal cuts the rest."""
    forms = {
        "train_loss": ("loss", "{:.3g}"),
        "rewards/accuracy": ("acc", "{:.0%}"),
        "perf/tokens_per_second": ("tok/s", "{:,.0f}"),
        "perf/peak_memory_gib": ("GiB", "{:.1f}"),
        "perf/mfu": ("mfu", "{:.0%}"),
    }
    return {name: form.format(line[field]) for field, (name, form) in forms.items() if field in line}

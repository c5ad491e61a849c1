"""Checkpoints on the disk: a folder a step, complete only once its marker is there, which is written last.

    checkpoints/step_120/
      engine/               DeepSpeed's state: weights, master weights, optimizer, one or more files a rank
      trainer_state.json    what else a run needs to resume, and the settings that must not have changed
      COMPLETE              every file with its size

A run killed while it saves leaves a folder without a marker. Nothing resumes from it, and it is removed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError, as_argument
from ..cache.durable_file import settle_folder, settle_tree, write_durably

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
MARKER = "COMPLETE"
_STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """What a run needs besides weights and optimizer.

    There is no generator to restore: order and learning rate are functions of the step, and dropout is off.

    Attributes:
        step: Updates done.
        num_ranks: Processes that saved it.
        zero_stage: Their ZeRO stage.
        run: The fingerprint of the run, which has to be the same for a resume to be exact: the mixture's digest,
            seed, global batch size and so on, under their options' names.
        tracking_run_id: The run's id at Weights & Biases, so that its curve continues.
        unlogged: Sums over the updates since the last log line and the seconds they took, so that the next line is what
            it would have been.
    """

    step: int
    num_ranks: int
    zero_stage: int
    run: Mapping[str, Any]
    tracking_run_id: str | None = None
    unlogged: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    state: TrainerState

    @property
    def run_folder(self) -> Path:
        """The folder of the run that saved it."""
        return self.path.absolute().parent.parent


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None; warns by name about newer ones that are not complete."""
    for path in _newest_first(folder):
        reason = _why_incomplete(path)
        if reason is None:
            return Checkpoint(path=path, state=_read_state(path))
        logger.warning("skipped checkpoint %s: %s", path, reason)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in one folder.

    Raises:
        DpoCacheError: It is not complete.
    """
    reason = _why_incomplete(path) if path.is_dir() else "there is no such folder"
    if reason is not None:
        _refuse_folder_of_checkpoints(path)
        raise DpoCacheError(
            f"{path} cannot be resumed from: {reason}",
            expected=f"a folder step_N with a file {MARKER}",
            next_step="--resume without a value takes the newest complete checkpoint of --output",
        )
    return Checkpoint(path=path, state=_read_state(path))


def _refuse_folder_of_checkpoints(path: Path) -> None:
    """The folder of a run, or its ``checkpoints``: a checkpoint in it was meant, and nothing was cut short."""
    held = [*_newest_first(path), *_newest_first(path / "checkpoints")]
    newest = next((checkpoint for checkpoint in held if is_complete(checkpoint)), None)
    if newest is not None:
        raise DpoCacheError(
            f"{path} cannot be resumed from: it holds checkpoints, and is none itself",
            expected="one of them",
            next_step=f"--resume {as_argument(newest)} takes the newest",
        )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands, if it does; ``folder`` is ``OUTPUT/checkpoints``."""
    return folder / f"step_{step}"


def is_complete(path: Path) -> bool:
    """Whether there is a whole checkpoint in this folder."""
    return _why_incomplete(path) is None


def complete_checkpoint(path: Path, state: TrainerState) -> None:
    """Bring a checkpoint whose engine has been saved to the disk, then mark it complete."""
    write_durably(path / STATE_FILE, _json_bytes(asdict(state)), temporary_folder=path)
    files = {str(file.relative_to(path)): file.stat().st_size for file in settle_tree(path)}
    write_durably(path / MARKER, _json_bytes({"files": files}), temporary_folder=path)
    settle_folder(path.parent)


def num_complete(folder: Path, *, up_to: int) -> int:
    """How many complete checkpoints there are of updates up to this one."""
    return sum(_step(path) <= up_to and is_complete(path) for path in _newest_first(folder))


def bytes_later_than(step: int, folder: Path) -> int:
    """Size of what :func:`remove_later_than` removes."""
    later = [path for path in _newest_first(folder) if _step(path) > step]
    return sum(file.stat().st_size for path in later for file in path.rglob("*") if file.is_file())


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill in the middle of a save left: it takes up room, and nothing can resume from it."""
    for path in _newest_first(folder):
        if not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)


def remove_later_than(step: int, folder: Path) -> list[Path]:
    """Remove the checkpoints of later updates, which the resumed run does again.

    Left there, they would count as the newest: the checkpoints of the repeated updates would be pruned in their place,
    and the next resume would continue a past that is not this run's.

    Args:
        step: Updates done where the run resumes.
        folder: ``OUTPUT/checkpoints``.

    Returns:
        What was removed.
    """
    later = [path for path in _newest_first(folder) if _step(path) > step]
    for path in later:
        _remove(path)
    return later


def prune_checkpoints(folder: Path, *, keep_last: int | None) -> None:
    """Remove all but the last ``keep_last`` complete checkpoints, and what is older than those and incomplete."""
    if keep_last is None:
        return
    newest_first = [path for path in _newest_first(folder) if is_complete(path)]
    kept = newest_first[:keep_last]
    for path in _newest_first(folder):
        if kept and path not in kept and _step(path) < _step(kept[0]):
            _remove(path)


def _remove(path: Path) -> None:
    (path / MARKER).unlink(missing_ok=True)  # first: half a checkpoint must not look like a whole one
    shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _why_incomplete(path: Path) -> str | None:
    """What a checkpoint lacks, or None."""
    try:
        sizes = json.loads((path / MARKER).read_bytes())["files"].items()
    except FileNotFoundError:
        return f"it has no {MARKER}, so saving it was cut short"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MARKER} cannot be read ({error})"
    for name, size in sizes:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _read_state(path: Path) -> TrainerState:
    try:
        return TrainerState(**json.loads((path / STATE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DpoCacheError(
            f"{path / STATE_FILE} cannot be read: {error}", next_step="resume from another checkpoint"
        ) from error


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

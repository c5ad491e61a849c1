"""Checkpoints to go on from: a folder a step, complete only once its marker is there, which is written last.

    checkpoints/step_120/
      engine/               DeepSpeed's state: weights, master weights, optimizer, one or more files a rank
      trainer_state.json    what else a run needs to go on, and what it must not have changed meanwhile
      COMPLETE              every file with its size

A run killed while it saves leaves a folder without marker. It is never gone on from, and never in the way.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ...errors import DpoCacheError
from ..cache.durable_file import write_durably
from .policy_engine import PolicyEngine

logger = logging.getLogger(__name__)

ENGINE_FOLDER = "engine"
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
        run: What must be the same to go on exactly: the mixture's digest, seed, global batch and the like, by the
            names people know them by.
        tracking_run_id: Of Weights & Biases, so that the curve goes on.
    """

    step: int
    num_ranks: int
    zero_stage: int
    run: Mapping[str, Any]
    tracking_run_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    state: TrainerState


def save_checkpoint(engine: PolicyEngine, folder: Path, state: TrainerState, *, keep_last: int | None) -> Path:
    """Save everything to go on from; collective.

    Args:
        engine: The engine to save.
        folder: ``OUTPUT/checkpoints``.
        state: The rest; its step names the checkpoint.
        keep_last: Complete checkpoints to keep, this one included; None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        DpoCacheError: It could not be written. Earlier checkpoints are as they were.
    """
    path = folder / f"step_{state.step}"
    exists = [_why_incomplete(path) is None]
    dist.broadcast_object_list(exists)  # rank 0's view: on a shared file system the others' may be out of date
    if exists[0]:
        return path
    if engine.rank == 0:
        _refuse_failure(lambda: _start_afresh(path), path)
    dist.barrier()
    _refuse_failure(lambda: _save_engine(engine, path), path)
    dist.barrier()  # every rank has written its files
    if engine.rank == 0:
        _refuse_failure(lambda: _complete(path, state), path)
        prune_checkpoints(folder, keep_last=keep_last)
    dist.barrier()
    return path


def _start_afresh(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _save_engine(engine: PolicyEngine, path: Path) -> None:
    client_state: dict[str, Any] = {}
    if engine.zero_stage in (1, 2):
        from deepspeed.checkpoint import UNIVERSAL_CHECKPOINT_VERSION_KEY, UNIVERSAL_CHECKPOINT_VERSION_VALUE

        # Without it the state cannot be converted for another number of ranks.
        client_state["universal_checkpoint_info"] = {
            UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE
        }
    engine.deepspeed.save_checkpoint(
        str(path),
        tag=ENGINE_FOLDER,
        client_state=client_state,
        save_latest=False,
        exclude_frozen_parameters=True,  # they are read from the model's own folder again
    )


def _complete(path: Path, state: TrainerState) -> None:
    """Bring everything to the disk, then say so."""
    write_durably(path / STATE_FILE, _json_bytes(asdict(state)), temporary_folder=path)
    files = {str(file.relative_to(path)): file.stat().st_size for file in sync_tree(path)}
    write_durably(path / MARKER, _json_bytes({"files": files}), temporary_folder=path)
    sync_tree(path.parent, deep=False)


def sync_tree(folder: Path, *, deep: bool = True) -> list[Path]:
    """Bring a folder and, if ``deep``, all within it to the disk; returns its files in order of their names."""
    entries = sorted(folder.rglob("*")) if deep else []
    for path in (*entries, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return [path for path in entries if path.is_file()]


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _refuse_failure(write: Callable[[], None], path: Path) -> None:
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise DpoCacheError(
            f"the checkpoint {path} could not be written: {error}",
            expected="room and permission to write",
            next_step="free some space (df -h), then run the same command with --resume",
        ) from error


def prune_checkpoints(folder: Path, *, keep_last: int | None) -> None:
    """Remove all but the last ``keep_last`` complete checkpoints, and what is older than those and incomplete."""
    if keep_last is None:
        return
    newest_first = [path for path in _newest_first(folder) if _why_incomplete(path) is None]
    kept = newest_first[:keep_last]
    for path in _newest_first(folder):
        if kept and path not in kept and _step(path) < _step(kept[0]):
            (path / MARKER).unlink(missing_ok=True)  # first: half a checkpoint must not look like a whole one
            shutil.rmtree(path, ignore_errors=True)


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
    reason = _why_incomplete(path)
    if reason is not None:
        raise DpoCacheError(
            f"{path} cannot be resumed from: {reason}",
            expected=f"a folder step_N with a file {MARKER}",
            next_step="--resume without a value takes the newest complete checkpoint",
        )
    return Checkpoint(path=path, state=_read_state(path))


def check_same_run(checkpoint: Checkpoint, *, run: Mapping[str, Any], zero_stage: int) -> None:
    """Refuse to go on with something else than what was begun.

    Raises:
        DpoCacheError: Naming each field that differs, with both values.
    """
    before = {**checkpoint.state.run, "zero_stage": checkpoint.state.zero_stage}
    now = {**run, "zero_stage": zero_stage}
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise DpoCacheError(
            f"{checkpoint.path} belongs to another run: " + "; ".join(different),
            expected="the settings the run began with; only the number of ranks may change",
            next_step="give the old values, or start afresh in another --output",
        )


def needs_conversion(checkpoint: Checkpoint, *, num_ranks: int) -> bool:
    """Whether its state is cut for another number of ranks; at stage 0 nothing is cut."""
    return checkpoint.state.zero_stage > 0 and checkpoint.state.num_ranks != num_ranks


def convert_checkpoint(checkpoint: Checkpoint, destination: Path) -> None:
    """Bring its state into DeepSpeed's universal form, which any number of ranks can load; on one process only.

    Args:
        checkpoint: The checkpoint; left as it is.
        destination: An absent folder; takes about as much space as the checkpoint and can go once it is loaded.

    Raises:
        DpoCacheError: DeepSpeed could not convert it.
    """
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    options = Namespace(
        input_folder=str(checkpoint.path / ENGINE_FOLDER),
        output_folder=str(destination / ENGINE_FOLDER),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    try:
        ds_to_universal(options)
    except (OSError, RuntimeError, AssertionError, KeyError) as error:
        raise DpoCacheError(
            f"{checkpoint.path} was saved by {checkpoint.state.num_ranks} ranks and could not be converted: {error}",
            next_step=f"resume with {checkpoint.state.num_ranks} ranks",
        ) from error


def load_checkpoint(engine: PolicyEngine, checkpoint: Checkpoint, *, converted: Path | None = None) -> None:
    """Load weights, master weights and optimizer; collective, right after the engine was made.

    Args:
        engine: Made with ``load_universal`` where ``converted`` is given.
        checkpoint: What to go on from.
        converted: The folder that :func:`convert_checkpoint` filled, where it was needed.
    """
    engine.load_state(converted or checkpoint.path, tag=ENGINE_FOLDER)
    assert engine.updates_done == checkpoint.state.step


def check_free_space(
    folder: Path,
    *,
    parameters: Iterable[nn.Parameter],
    weight_bytes: int,
    keep_last: int | None,
    only_adapter: bool = False,
) -> None:
    """Refuse early a disk that the run would fill.

    Args:
        folder: Where checkpoints go.
        parameters: The policy's, partitioned or not; frozen ones are not in a checkpoint.
        weight_bytes: Bytes of a weight in the dtype computed in.
        keep_last: Checkpoints kept; one more exists while a new one is written. None counts as one.
        only_adapter: The model saved at the end is what was trained, without the frozen weights.

    Raises:
        DpoCacheError: There is less room than that.
    """
    trained = total = 0
    for parameter in parameters:
        numbers = int(getattr(parameter, "ds_numel", parameter.numel()))
        total += numbers
        trained += numbers if parameter.requires_grad else 0
    # Master weight and two moments in float32, and the weight itself; one more copy of the weights is the model.
    checkpoint = trained * (12 + weight_bytes)
    needed = checkpoint * ((keep_last or 1) + 1) + (trained if only_adapter else total) * weight_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DpoCacheError(
            f"{folder} has {free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB for {(keep_last or 1) + 1} checkpoints and the model",
            next_step="free some space, choose another --output, or lower --keep-last-n-checkpoints",
        )


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
        sizes = json.loads((path / MARKER).read_bytes())["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so saving it was cut short"
    except (OSError, ValueError, KeyError) as error:
        return f"its {MARKER} cannot be read ({error})"
    for name, size in sizes.items():
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

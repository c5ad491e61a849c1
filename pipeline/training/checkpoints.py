"""Saving a training engine, converting what was saved for another number of ranks, and loading it."""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from .checkpoint_folder import (
    Checkpoint,
    TrainerState,
    checkpoint_path,
    complete_checkpoint,
    prune_checkpoints,
)
from .host_group import wait_for_all
from .policy_engine import PolicyEngine

ENGINE_FOLDER = "engine"


def save_checkpoint(engine: PolicyEngine, folder: Path, state: TrainerState, *, keep_last: int | None) -> Path:
    """Save everything that a resumed run needs; collective.

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
    path = checkpoint_path(folder, state.step)
    if engine.rank == 0:
        _refuse_failure(lambda: _start_afresh(path), path)
    wait_for_all()
    _refuse_failure(lambda: _save_engine(engine, path), path)
    wait_for_all()  # every rank has written its files
    if engine.rank == 0:
        _refuse_failure(lambda: complete_checkpoint(path, state), path)
        prune_checkpoints(folder, keep_last=keep_last)
    wait_for_all()
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


def _refuse_failure(write: Callable[[], None], path: Path) -> None:
    try:
        write()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise DpoCacheError(
            f"the checkpoint {path} could not be written: {error}",
            expected="room and permission to write",
            next_step="free some space (df -h), then run the same command with --resume",
        ) from error


def needs_conversion(checkpoint: Checkpoint, *, num_ranks: int) -> bool:
    """Whether its state is cut for another number of ranks; at stage 0 nothing is cut."""
    return checkpoint.state.zero_stage > 0 and checkpoint.state.num_ranks != num_ranks


def convert_checkpoint(checkpoint: Checkpoint, destination: Path) -> None:
    """Bring its state into DeepSpeed's universal form, which any number of ranks can load; on one process only.

    It is done in this process alone. DeepSpeed's own workers are forked, and the threads that this process has by now
    (of torch, of the process group) do not survive that: a forked worker could wait for them for ever.

    Args:
        checkpoint: The checkpoint; left as it is.
        destination: An absent folder; takes about as much space as the checkpoint, meanwhile twice that, and can go
            once it is loaded.

    Raises:
        DpoCacheError: DeepSpeed could not convert it; nothing of it stays.
    """
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    destination.mkdir(parents=True)
    with _plainly_named(checkpoint.path) as source, _plainly_named(destination) as target:
        options = Namespace(
            input_folder=str(source / ENGINE_FOLDER),
            output_folder=str(target / ENGINE_FOLDER),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        try:
            ds_to_universal(options)
        except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
            shutil.rmtree(destination, ignore_errors=True)
            raise DpoCacheError(
                f"{checkpoint.path} was saved by {checkpoint.state.num_ranks} ranks and could not be converted: "
                f"{error}",
                next_step="if the disk is full (df -h), free about twice the checkpoint's size; else resume with "
                f"{checkpoint.state.num_ranks} ranks",
            ) from error


@contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """A link to a folder, without characters that mean something in a pattern, such as those of ``beta[5]`` or ``a+b``.

    DeepSpeed puts paths into patterns as they are, and would find no file of a checkpoint that it has saved there.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as links:
        link = Path(links) / "checkpoint"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def load_checkpoint(engine: PolicyEngine, checkpoint: Checkpoint, *, converted: Path | None = None) -> None:
    """Load weights, master weights and optimizer; collective, right after the engine was made.

    Args:
        engine: Made with ``load_universal`` where ``converted`` is given.
        checkpoint: What to resume from.
        converted: The folder that :func:`convert_checkpoint` filled, where it was needed.
    """
    with _plainly_named(converted or checkpoint.path) as folder:
        engine.load_state(folder, tag=ENGINE_FOLDER)
    assert engine.updates_done == checkpoint.state.step

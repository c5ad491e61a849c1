"""The lines of ``metrics.jsonl`` as TensorBoard's event files."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError

logger = logging.getLogger(__name__)

EVALUATION = "eval/"


def require_tensorboard() -> None:
    """Say so at once if the package is not there.

    Raises:
        DpoCacheError: It is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise DpoCacheError(
            "--with-tensorboard needs tensorboard, which is not installed",
            next_step="pip install 'dpo-cache[tensorboard]'",
        )


class TensorBoardFiles:
    """Event files that can fail in every way without the training noticing.

    Args:
        folder: Where they go; those of the run so far may lie there.
        last_step: The step of the checkpoint resumed from; 0 for a fresh run. What was written of later steps is
            taken back, for they come again.
    """

    def __init__(self, folder: Path, *, last_step: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            # An evaluation before the first step comes again too, where a run starts from the beginning.
            self._writer = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else 0)
        except Exception as error:  # whatever goes wrong with event files, training goes on
            logger.warning("TensorBoard's event files cannot be written: %s; metrics.jsonl goes on", error)

    def write(self, line: Mapping[str, float]) -> None:
        """Write one line under its step; the first failure ends the event files, not the run."""
        if self._writer is None:
            return
        try:
            for name, value in line.items():
                if name != "training_step":
                    self._writer.add_scalar(tag_of(name), value, int(line["training_step"]))
            self._writer.flush()  # a kill loses nothing that a checkpoint to come counts as written
        except Exception as error:  # as above
            logger.warning("TensorBoard's event files end here: %s; metrics.jsonl goes on", error)
            self._writer = None

    def close(self) -> None:
        """Close the file."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:  # as above
            logger.warning("TensorBoard's event file did not close: %s", error)


def tag_of(field: str) -> str:
    """The name of a field's curve: ``train/loss``, ``train/rewards/margin``, ``eval/loss``."""
    return field if field.startswith(EVALUATION) else "train/" + field.removeprefix("train_")

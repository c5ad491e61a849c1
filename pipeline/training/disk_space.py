"""Whether a disk has room for what a run will write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...errors import DpoCacheError
from ..cache.free_space import free_bytes
from ..scoring.quantization import num_elements

OPTIMIZER_BYTES = 12
"""Of a trained weight in a checkpoint: its master and AdamW's two moments, in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFiles:
    """What a run has still to write, and what lies there already.

    Attributes:
        checkpoint_bytes: Size of a checkpoint.
        model_bytes: Size of a saved model.
        checkpoints_to_save: Checkpoints that the run will save.
        checkpoints_held: Those that an earlier part of it left. They count among those kept.
        keep_last: Checkpoints kept; one more exists while a new one is written. None keeps all.
        models_to_save: Models that the run will save before its end, all of which stay.
        keeps_best: Whether the best model is kept.
        has_best: Whether an earlier part of the run left one. It stays until a better one is whole.
        saves_model: Whether the run comes to its end, where it saves the model.
    """

    checkpoint_bytes: int
    model_bytes: int
    checkpoints_to_save: int
    checkpoints_held: int = 0
    keep_last: int | None
    models_to_save: int = 0
    keeps_best: bool = False
    has_best: bool = False
    saves_model: bool = True

    def most_at_once(self) -> tuple[int, int]:
        """Checkpoints and models that need room at the fullest moment, besides what lies there already.

        That is when a checkpoint is saved before another one goes, or when the last model is written. A better best
        model takes as much room as that one, and comes while as many checkpoints are there.
        """
        models = self.models_to_save + (1 if self.keeps_best and not self.has_best else 0)
        more = 1 if self.saves_model or self.keeps_best else 0
        moments = [(self._most_checkpoints(), models), (self._kept_checkpoints(), models + more)]
        return max(moments, key=lambda moment: self.size(*moment))

    def size(self, checkpoints: int, models: int) -> int:
        """Bytes of so many."""
        return checkpoints * self.checkpoint_bytes + models * self.model_bytes

    def _most_checkpoints(self) -> int:
        """More than are there now, while the last of them is saved."""
        if self.keep_last is None or not self.checkpoints_to_save:
            return self.checkpoints_to_save
        return max(1, min(self.keep_last + 1 - self.checkpoints_held, self.checkpoints_to_save))

    def _kept_checkpoints(self) -> int:
        """More than are there now, once all are saved; fewer than none where fewer are kept."""
        if self.keep_last is None or not self.checkpoints_to_save:
            return self.checkpoints_to_save
        return min(self.keep_last - self.checkpoints_held, self.checkpoints_to_save)


def planned_sizes(
    parameters: Iterable[nn.Parameter], *, zero_stage: int, weight_bytes: int, saved_bytes: int, only_adapter: bool
) -> dict[str, int]:
    """``checkpoint_bytes`` and ``model_bytes`` of :class:`PlannedFiles`.

    Args:
        parameters: The policy's, partitioned or not; frozen ones are not in a checkpoint.
        zero_stage: DeepSpeed's.
        weight_bytes: Bytes of a weight in the dtype computed in.
        saved_bytes: Bytes of a weight in a saved model.
        only_adapter: A saved model is what was trained, without the frozen weights.
    """
    trained = total = 0
    for parameter in parameters:
        numbers = num_elements(parameter)
        total += numbers
        trained += numbers if parameter.requires_grad else 0
    # Beside a master of the same precision, stage 0 keeps no other weight; stage 3 makes it from the master again.
    is_master = zero_stage == 3 or (zero_stage == 0 and weight_bytes == 4)
    return {
        "checkpoint_bytes": trained * (OPTIMIZER_BYTES + (0 if is_master else weight_bytes)),
        "model_bytes": (trained if only_adapter else total) * saved_bytes,
    }


def check_free_space(folder: Path, planned: PlannedFiles, *, freed_bytes: int = 0) -> None:
    """Refuse early a disk that the run would fill.

    Args:
        folder: Where the run's files go.
        planned: What it has still to write.
        freed_bytes: Of files that it removes before it writes any.

    Raises:
        DpoCacheError: There is less room than that.
    """
    checkpoints, models = planned.most_at_once()
    needed = planned.size(checkpoints, models)
    free = free_bytes(folder) + freed_bytes
    if free < needed:
        files = [
            f"{number} more {name}{'' if number == 1 else 's'}"
            for number, name in ((checkpoints, "checkpoint"), (models, "model"))
            if number > 0
        ]
        raise DpoCacheError(
            f"{folder} has {free / 2**30:.1f} GiB free",
            expected=f"{needed / 2**30:.1f} GiB for {' and '.join(files)}",
            next_step="free some space, choose another --output, keep fewer checkpoints with "
            "--keep-last-n-checkpoints" + (", or save fewer models" if planned.models_to_save else ""),
        )

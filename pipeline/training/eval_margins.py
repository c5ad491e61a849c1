"""The reward margin of every held-out pair at an evaluation, for whoever wants to read the best and the worst.

Shapes: P pairs of the evaluation mixture, B pairs of a micro-batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ..cache.example_key import Keys, key_at
from ..finite_json import finite_json
from .micro_batch import ScoredMicroBatch
from .run_file import write_run_file

EVAL_MARGINS = "eval_margins.jsonl"
"""Its name in a run's folder."""


class EvalMargins:
    """Collects margins by their pair's place in the mixture, so that one sum brings the ranks together.

    Args:
        num_pairs: P.
        device: Where they are kept, so that adding never waits for the device.
    """

    def __init__(self, num_pairs: int, *, device: torch.device) -> None:
        self._margins_P = torch.zeros(num_pairs, dtype=torch.float64, device=device)
        self._rows: list[npt.NDArray[np.int64]] = []
        self._margins: list[torch.Tensor] = []

    def add(self, rows_B: npt.NDArray[np.int64], scored: ScoredMicroBatch) -> None:
        """Take the margins of the pairs in these rows of the mixture; an objective without rewards has none."""
        chosen_B, rejected_B = scored.outcomes.chosen_rewards_B, scored.outcomes.rejected_rewards_B
        if chosen_B is not None and rejected_B is not None:
            self._rows.append(rows_B)
            self._margins.append(chosen_B - rejected_B)

    def reduce(self) -> npt.NDArray[np.float64]:
        """All margins in the mixture's order, on all ranks alike; all ranks call this."""
        if self._rows:
            rows = torch.from_numpy(np.concatenate(self._rows))
            self._margins_P[rows.to(self._margins_P.device)] = torch.cat(self._margins)
        dist.all_reduce(self._margins_P)
        return self._margins_P.cpu().numpy()


def write_eval_margins(path: Path, *, training_step: int, keys: Keys, margins: npt.NDArray[np.float64]) -> None:
    """One line a pair, in the mixture's order; the file of the evaluation before is replaced as a whole.

    Args:
        path: The file.
        training_step: Updates done before this evaluation.
        keys: Shape (P,).
        margins: Shape (P,); one that is not finite is written as null.
    """
    lines = []
    for place, margin in enumerate(margins.tolist()):
        line = {"training_step": training_step, "key": key_at(keys, place).hex(), "rewards/margin": margin}
        lines.append(finite_json(line) + "\n")
    write_run_file(path, "".join(lines))

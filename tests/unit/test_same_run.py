"""Resuming a run with other settings than it was begun with."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.checkpoint_folder import Checkpoint, TrainerState
from dpo_cache.pipeline.training.same_run import check_same_run

RUN = {"mixture": "a1b2", "seed": 42, "global_batch_size": 6}
CHECKPOINT = Checkpoint(path=Path("step_3"), state=TrainerState(step=3, num_ranks=2, zero_stage=3, run=RUN))


def test_another_run_is_refused_by_field() -> None:
    check_same_run(CHECKPOINT, run=RUN, zero_stage=3)
    with pytest.raises(DpoCacheError, match="mixture was 'a1b2' and is 'ffff'; seed was 42 and is 7"):
        check_same_run(CHECKPOINT, run={**RUN, "mixture": "ffff", "seed": 7}, zero_stage=3)
    with pytest.raises(DpoCacheError, match="zero_stage was 3 and is 2"):
        check_same_run(CHECKPOINT, run=RUN, zero_stage=2)
    with pytest.raises(DpoCacheError, match="loss was None and is 'dpo'"):
        check_same_run(CHECKPOINT, run={**RUN, "loss": "dpo"}, zero_stage=3)


def test_causes_take_the_place_of_the_fields_that_follow_from_them() -> None:
    causes = {"total_steps": ["--max-steps was 2 and is 3"], "warmup_steps": ["--max-steps was 2 and is 3"]}
    longer = {**RUN, "total_steps": 3, "warmup_steps": 1, "seed": 7}
    with pytest.raises(DpoCacheError, match="run: seed was 42 and is 7; --max-steps was 2 and is 3\n"):
        check_same_run(CHECKPOINT, run=longer, zero_stage=3, causes=lambda field: causes.get(field, []))

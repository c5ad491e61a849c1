"""One scoring process, from its start to whatever ends it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from torch.distributed import DistBackendError

from ...errors import DpoCacheError, first_line
from ..building.build_plan import ScoringPlan
from ..console.library_output import quiet_libraries
from ..processes.devices import device_of_rank, gpu_explained
from ..processes.heartbeat import Heartbeat, process_name
from ..processes.job_store import RUN_AGAIN, STORE_FAULTS, StoreAddress, store_lost
from .scoring_worker import ScoringWorker

SMALLER_BATCHES = "a smaller --max-seq-length or --tokens-per-batch, or --zero-stage 3 on several GPUs"


def score_units(plan_path: Path, address: StoreAddress, rank_of_node: int) -> None:
    """Score units until the build has none left.

    Args:
        plan_path: The plan that the leading process wrote.
        address: Where the build's store is.
        rank_of_node: Which GPU of this machine is ours.

    Raises:
        DpoCacheError: The model cannot be used, a pair does not fit into memory, or the store is lost.
    """
    signal.signal(signal.SIGTERM, _stop)
    quiet_libraries()
    plan = ScoringPlan.read(plan_path)
    device = device_of_rank(rank_of_node)
    try:
        with gpu_explained(SMALLER_BATCHES), Heartbeat(address.connect(), process_name(os.getpid())):
            if not plan.zero_stage:
                ScoringWorker(plan, address, device).run()
                return
            from .partitioned_scoring import partitioned_scoring  # only now: it imports DeepSpeed

            with partitioned_scoring(plan, address, device) as partitioned:
                ScoringWorker(plan, address, device, partitioned).run()
    except KeyboardInterrupt:
        return  # asked to stop: the unit in hand is dropped
    except STORE_FAULTS as lost:
        raise store_lost() from lost
    except DistBackendError as apart:
        raise DpoCacheError(
            f"the ranks that share the reference's weights lost each other: {first_line(apart)}",
            next_step=f"look at the network and at the other ranks' output, then {RUN_AGAIN}",
        ) from apart


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

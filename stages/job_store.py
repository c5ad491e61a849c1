"""The key-value store through which the processes of a build meet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from ..errors import DpoCacheError
from .ranks import Ranks, rendezvous_environment

CONNECT_TIMEOUT = timedelta(seconds=120)
FAREWELL_S = 30.0
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """Where a job's store is, and the prefix of its keys there; text that a child process can be given.

    Attributes:
        host: Name or address of the machine.
        port: TCP port.
        prefix: Keeps this job's keys apart from a launcher's own, and from those of a restart.
    """

    host: str
    port: int
    prefix: str = "dpo-cache"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}/{self.prefix}"

    @classmethod
    def parse(cls, text: str) -> StoreAddress:
        """Read what ``str`` wrote."""
        place, _, prefix = text.partition("/")
        host, _, port = place.rpartition(":")
        return cls(host=host, port=int(port), prefix=prefix)

    def connect(self) -> Store:
        """A connection of one's own: a store is not shared between threads.

        Raises:
            DpoCacheError: Nothing answers there.
        """
        try:
            return PrefixStore(self.prefix, TCPStore(self.host, self.port, is_master=False, timeout=CONNECT_TIMEOUT))
        except DistError as lost:
            raise store_lost() from lost


class JobStore:
    """The store of one build, as a leading or following process of it holds it.

    Rank 0 hosts it, unless torchrun's agent already does; without a launcher it lives on the loopback interface.

    Args:
        ranks: This process's place; None where no launcher started it.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self._ranks = ranks
        if ranks is None:
            hosted = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            self.address = StoreAddress(host="127.0.0.1", port=hosted.port)
            self._hosted: TCPStore | None = hosted
        else:
            environment = {**os.environ, **rendezvous_environment(ranks)}
            restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            self.address = StoreAddress(host=host, port=port, prefix=f"dpo-cache-{restart}")
            agent_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self._hosted = None
            if ranks.rank == 0 and not agent_hosts:
                self._hosted = TCPStore(host, port, is_master=True, wait_for_workers=False)
        self.store = self.address.connect()

    def announce_plan(self, plan: Path) -> None:
        """Tell the following ranks where the plan lies."""
        self.store.set("plan", str(plan))

    def announce_failure(self, reason: str) -> None:
        """Tell the following ranks that there will be no plan."""
        self.store.set("failed", reason)

    def wait_for_plan(self) -> Path:
        """Where the plan lies, once the leader has made it; tokenising may take hours.

        Raises:
            DpoCacheError: The leader failed or is gone, or this machine does not see the leader's folder.
        """
        while not self.store.check(["plan"]):
            if self.store.check(["failed"]):
                raise DpoCacheError(self.store.get("failed").decode())
            time.sleep(POLL_S)
        plan = Path(self.store.get("plan").decode())
        if not plan.exists():
            raise DpoCacheError(
                f"this machine does not see {plan}, which rank 0 wrote",
                expected="a cache folder on a file system that all nodes share",
                next_step="build a part on each node into a folder of its own, then unite them: dpo-cache merge",
            )
        return plan

    def leave(self) -> None:
        """A following rank is done."""
        self.store.add("left", 1)

    def wait_for_others(self) -> None:
        """Keep the store up until the following ranks have left it, for a while at most."""
        if self._ranks is not None:
            _wait_until(lambda: self.store.add("left", 0) >= self._ranks.num_ranks - 1)  # type: ignore[union-attr]


def store_lost() -> DpoCacheError:
    """The fault of a process whose store is gone."""
    return DpoCacheError(
        "the process that hands out the work of this build is gone",
        next_step="run the same command again: what is finished stays",
    )


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FAREWELL_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)

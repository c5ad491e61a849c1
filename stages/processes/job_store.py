"""The key-value store through which the processes of a build meet."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError, DistNetworkError, DistStoreError

from ...errors import DpoCacheError, first_line
from .heartbeat import Heartbeat, HeartMonitor
from .ranks import Ranks, rendezvous_environment

STORE_FAULTS = (DistNetworkError, DistStoreError)
"""What a store raises whose host is gone; a collective that fails is a fault of its own."""
CONNECT_TIMEOUT = timedelta(seconds=120)
"""How far apart the ranks of a build may start."""
CONNECT_ATTEMPT_S = 10.0
FAREWELL_S = 30.0
POLL_S = 0.5
RUN_AGAIN = "run the same command again: what is finished stays, it scores only the rest"
LEADER_PATIENCE = 4.0
"""A leader sorts and writes millions of rows and may miss beats; a following rank only waits."""


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
        self._wait_for_host()
        try:
            return PrefixStore(self.prefix, TCPStore(self.host, self.port, is_master=False, timeout=CONNECT_TIMEOUT))
        except STORE_FAULTS as lost:
            raise store_lost() from lost

    def _wait_for_host(self) -> None:
        """Wait until something listens there: torch itself waits up to three times as long, and prints a stack."""
        deadline = time.monotonic() + CONNECT_TIMEOUT.total_seconds()
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=CONNECT_ATTEMPT_S).close()
                return
            except OSError as refused:
                if time.monotonic() > deadline:
                    raise DpoCacheError(
                        f"the process that leads this build does not answer at {self.host}:{self.port}: {refused}",
                        expected=f"an answer within {CONNECT_TIMEOUT.total_seconds():.0f} s",
                        next_step=f"see that this machine reaches that port, then {RUN_AGAIN}",
                    ) from refused
            time.sleep(POLL_S)


class JobStore:
    """The store of one build, as a leading or following process of it holds it.

    Rank 0 hosts it, unless torchrun's agent already does; without a launcher it lives on the loopback interface.

    Args:
        ranks: This process's place; None where no launcher started it.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ranks
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
                self._hosted = _host_store(host, port)
        self.store = self.address.connect()
        self._hearts = HeartMonitor(self.store)

    def beating(self) -> AbstractContextManager[object]:
        """While this is open the other ranks see that this one is alive."""
        if self.ranks is None:
            return nullcontext()
        return Heartbeat(self.address.connect(), f"rank-{self.ranks.rank}")

    # ---- the leader ------------------------------------------------------------------------------------------------

    def announce_plan(self, plan: Path) -> None:
        """Tell the following ranks where the plan lies."""
        self.store.set("plan", str(plan))

    def wait_for_others(self, *, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until every following rank has scored what it can or is dead; hours, where only others can score.

        A rank that has not come yet is waited for as long as it would wait for this one.
        """
        while [rank for rank in self._who_has_not_told("scored") if not self._has_told(rank, "left")]:
            while_waiting()
            time.sleep(POLL_S)

    def num_living(self) -> int:
        """Ranks whose heart beats, this one included; to be asked often, as nobody's silence counts before."""
        return 1 + sum(not self._has_stopped(rank) and self._has_begun(rank) for rank in self._others())

    def lost_ranks(self) -> list[int]:
        """Following ranks that died or left before they had scored what they could."""
        return [rank for rank in self._others() if not self.store.check([f"scored/{rank}"])]

    def announce_end(self, failure: str | None = None) -> None:
        """Tell the following ranks how the build ended, and keep the store up while they hear of it.

        A rank that is still to come is waited for where the build is finished: without the store it would fail.
        """
        self.store.set("ended", failure or "")
        deadline = time.monotonic() + FAREWELL_S
        while (staying := self._who_has_not_told("left")) and time.monotonic() < deadline:
            if failure is None and not all(map(self._has_begun, staying)):
                deadline = time.monotonic() + FAREWELL_S
            time.sleep(POLL_S)

    def _who_has_not_told(self, what: str) -> list[int]:
        """Looks at every rank, so that the clocks of those that are silent run side by side."""
        return [rank for rank in self._others() if not self._has_told(rank, what)]

    def _has_told(self, rank: int, what: str) -> bool:
        """Whether a rank has come that far; a dead one has nothing more to tell."""
        return self.store.check([f"{what}/{rank}"]) or self._has_stopped(rank)

    def _has_stopped(self, rank: int) -> bool:
        return self._hearts.has_stopped(f"rank-{rank}", starting_s=CONNECT_TIMEOUT.total_seconds())

    def _has_begun(self, rank: int) -> bool:
        return self._hearts.has_begun(f"rank-{rank}")

    def _others(self) -> range:
        return range(1, self.ranks.num_ranks if self.ranks else 1)

    # ---- the following ranks ---------------------------------------------------------------------------------------

    def wait_for_plan(self) -> Path | None:
        """Where the plan lies, once the leader has made it; tokenising may take hours. None where there is none.

        Raises:
            DpoCacheError: The leader failed or is gone, or this machine does not see the leader's folder.
        """
        while True:
            if self.has_ended():  # first: a rank that comes late finds a plan whose files are gone
                return None
            if self.store.check(["plan"]):
                break
            self._require_leader()
            time.sleep(POLL_S)
        plan = Path(self.store.get("plan").decode())
        if not plan.exists():
            raise DpoCacheError(
                f"this machine does not see {plan}, which rank 0 wrote",
                expected="a cache folder on a file system that all nodes share",
                next_step="build a part on each node into a folder of its own, then unite them: dpo-cache merge",
            )
        return plan

    def announce_scored(self) -> None:
        """This rank has nothing left to score."""
        assert self.ranks is not None
        self.store.set(f"scored/{self.ranks.rank}", "")

    def wait_for_end(self) -> None:
        """Wait until the leader has written the mixture.

        Raises:
            DpoCacheError: It failed or is gone: the build is not finished.
        """
        while not self.has_ended():
            self._require_leader()
            time.sleep(POLL_S)

    def has_ended(self) -> bool:
        """Whether the leader has written the mixture.

        Raises:
            DpoCacheError: It failed.
        """
        if not self.store.check(["ended"]):
            return False
        if failure := self.store.get("ended").decode():
            raise DpoCacheError(failure)
        return True

    def leave(self) -> None:
        """A following rank needs the store no more."""
        assert self.ranks is not None
        self.store.set(f"left/{self.ranks.rank}", "")

    def _require_leader(self) -> None:
        if self._hearts.has_stopped("rank-0", patience=LEADER_PATIENCE):
            raise DpoCacheError("rank 0, which leads this build and writes its mixture, is gone", next_step=RUN_AGAIN)


@contextmanager
def leading(ranks: Ranks | None) -> Iterator[JobStore | None]:
    """The store of the ranks that a launcher started, while rank 0 leads their build; None without a launcher.

    Raises:
        DpoCacheError: The store is gone.
    """
    if ranks is None:
        yield None
        return
    try:
        job = JobStore(ranks)
        with job.beating():
            try:
                yield job
            except BaseException as fault:
                job.announce_end(f"rank 0 ended: {str(fault) or 'it was asked to stop'}")
                raise
            job.announce_end()
    except STORE_FAULTS as lost:
        raise store_lost() from lost


def store_lost() -> DpoCacheError:
    """The fault of a process whose store is gone."""
    return DpoCacheError(
        "the process that hands out the work of this build is gone",
        next_step=RUN_AGAIN,
    )


def _host_store(host: str, port: int) -> TCPStore:
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    except DistError as refused:
        raise DpoCacheError(
            f"the store of this build cannot listen on {host}:{port}: {first_line(refused)}",
            expected="a free port of the machine of rank 0",
            next_step="name one: MASTER_PORT=…",
        ) from refused

"""Where ranks of this machine meet: a store that one process hosts before any rank looks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import TCPStore


@contextmanager
def hosted_rendezvous() -> Iterator[dict[str, str]]:
    """Host a store for as long as the ranks need it; gives the variables that lead torch.distributed there.

    The kernel picks the port, and the store listens on it from then on. A port that was only looked up could be taken
    by another run before a rank listens there.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: the store is there, no rank opens it
    }

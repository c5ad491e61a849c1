"""How much memory of its own a process needs at most while it does something."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from types import TracebackType

SAMPLE_S = 0.002


class PeakMemory:
    """Watches the memory of this process that the kernel could not take back: no files it has mapped. In MiB.

    Attributes:
        before: When this was entered.
        peak: The most that was seen meanwhile.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth(self) -> float:
        """What was needed on top of what was there."""
        return self.peak - self.before

    def __enter__(self) -> PeakMemory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not to hide what is needed now
        self.before = self.peak = _own_mib()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _own_mib())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak = max(self.peak, _own_mib())


def _own_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("this kernel does not tell RssAnon")

"""A plain web server on 127.0.0.1 for a folder, which fails as it is told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

from local_server import local_server


@dataclass
class FileServer:
    """What it serves, and how it is to fail.

    Attributes:
        folder: What it serves; a request for ``/a`` is answered with ``folder/a``.
        url: Its address.
        lists_folders: Whether it lists what is in a folder.
        drop: Cut so many answers with a Parquet file off in their middle.
        hold: Let requests for Parquet files wait until this is set, after so many that went through.
        endless: Paths that are answered with zeros for as long as somebody listens, and with no word on their size.
        sent_bytes: How many of those went out.
        requests: How often each path was asked for.
    """

    folder: Path
    url: str = ""
    lists_folders: bool = True
    drop: int = 0
    hold: threading.Event = field(default_factory=threading.Event)
    hold_after: int | None = None
    endless: set[str] = field(default_factory=set)
    sent_bytes: int = 0
    requests: Counter[str] = field(default_factory=Counter)

    def shard_requests(self) -> Counter[str]:
        """How often each shard was asked for."""
        return Counter({path: count for path, count in self.requests.items() if "/shards/" in path})


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """Serve a folder in a thread."""
    state = FileServer(folder)
    handler = type("Handler", (_Handler,), {"state": state})
    with local_server(handler) as address:
        state.url = address
        try:
            yield state
        finally:
            state.hold.set()


class _Handler(SimpleHTTPRequestHandler):
    state: FileServer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(self.state.folder))

    def do_GET(self) -> None:
        self.state.requests[self.path] += 1
        if self.path in self.state.endless:
            self._go_on()
            return
        if self.path.endswith(".parquet") and self._fails():
            return
        super().do_GET()

    def _go_on(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while self.state.sent_bytes < 1 << 30:
                self.state.sent_bytes += self.wfile.write(bytes(1 << 16))

    def list_directory(self, path: Any) -> Any:
        if self.state.lists_folders:
            return super().list_directory(path)
        self.send_error(403)
        return None

    def _fails(self) -> bool:
        if self.state.hold_after is not None and sum(self.state.shard_requests().values()) > self.state.hold_after:
            self.state.hold.wait()
        if self.state.drop <= 0:
            return False
        self.state.drop -= 1
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

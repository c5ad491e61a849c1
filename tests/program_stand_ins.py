"""Our programs as a shell or a launcher finds them, begun with their imports made.

Each is a small script that asks the test for a process, forked for it, with the script's arguments, folder and
variables. The process writes to what the script was started with, and ends with it.
"""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from documentation_blocks import PROGRAMS
from dpo_cache import cli
from forked_process import start_forked

_STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as test:
    test.connect({address!r})
    asked = dict(program={program!r}, arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
    test.sendall(json.dumps(dict(asked, pid=os.getpid())).encode() + b"\\n")
    sys.exit(int(test.makefile().readline()))
"""


@contextmanager
def stand_ins(folder: Path) -> Iterator[Path]:
    """Put a stand-in for each of our programs into a folder; they work until this ends."""
    address = f"\0dpo-cache-{uuid.uuid4().hex}"
    for program in PROGRAMS:
        path = folder / program
        path.write_text(_STAND_IN.format(python=sys.executable, address=address, program=program), encoding="utf-8")
        path.chmod(0o755)
    with socketserver.ThreadingUnixStreamServer(address, _Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder
        server.shutdown()


class _Asked(socketserver.StreamRequestHandler):
    """One program, from its start to its exit code."""

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())
        process = start_forked(
            _run,
            *(asked["program"], asked["arguments"], asked["folder"]),
            environment=asked["environment"],
            stdout=Path(f"/proc/{asked['pid']}/fd/1"),
            stderr=Path(f"/proc/{asked['pid']}/fd/2"),
        )
        if process.sentinel not in connection.wait([process.sentinel, self.request]):
            process.kill()  # the stand-in was
        process.join()
        self.wfile.write(f"{process.exitcode}\n".encode())


def _run(program: str, arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    getattr(cli, program.replace("-", "_"))(arguments, prog_name=program)

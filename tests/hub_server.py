"""A stand-in for the Hugging Face Hub on 127.0.0.1: enough of its interface for the real client to upload a model."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"


@dataclass
class HubServer:
    """What it was told, and how it is to fail.

    Attributes:
        url: Its address, for ``HF_ENDPOINT``.
        files: ``files[repo, branch][path]``, the bytes of a file.
        private: Whether each repository was asked to be private.
        fail_commits: Answer commits with this status; None to accept them.
        may_write: Let the user write.
        requests: Method and path of all requests.
    """

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    fail_commits: int | None = None
    may_write: bool = True
    requests: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use it."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run one in a thread."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        path = self._path()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "not logged in"})
        elif path.endswith("/whoami-v2"):
            self._answer(200, {"name": "tester", "type": "user"})
        elif path.endswith("/auth-check/write"):
            self._answer(200 if self.hub.may_write else 403, {"error": "no write access"})
        elif "revision" in path.split("/"):
            self._answer(200, {"id": "/".join(path.split("/")[3:5]), "sha": "0" * 40, "siblings": []})
        else:
            self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            known = name in self.hub.private
            self.hub.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private") is True)
            self._answer(409 if known else 200, {"url": f"{self.hub.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "branch" in parts:
            self._answer(200, {})
        elif "preupload" in parts:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        elif "commit" in parts and self.hub.fail_commits is not None:
            self._answer(self.hub.fail_commits, {"error": "broken on purpose"})
        elif "commit" in parts:
            self._commit("/".join(parts[3:5]), unquote(parts[-1]), body)
        else:
            self._answer(404, {"error": "not found"})

    def do_HEAD(self) -> None:
        self._path()
        self._answer(404, {})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        files = self.hub.files.setdefault((repo, branch), {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.hub.url}/{repo}/commit/cccc"})

    def _path(self) -> str:
        self.hub.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

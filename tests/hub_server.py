"""A stand-in for the Hugging Face Hub on 127.0.0.1: enough of its interface for the real client, up and down."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from local_server import local_server

TOKEN = "hf_of_the_tests"
Files = dict[str, bytes]


@dataclass
class HubServer:
    """What it was told, and how it is to fail.

    Attributes:
        url: Its address, for ``HF_ENDPOINT``.
        files: ``files[repo, branch][path]``, the bytes of a file.
        commits: The files as they were after each commit.
        private: Whether each repository was asked to be private.
        fail_commits: Answer commits with this status; None to accept them.
        may_write: Let the user write.
        accept_uploads: How many large files to take before every other one is refused; None for all.
        drop_downloads: Cut so many downloads of Parquet files off in their middle.
        requests: Method and path of all requests.
    """

    url: str = ""
    files: dict[tuple[str, str], Files] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    heads: dict[tuple[str, str], str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    fail_commits: int | None = None
    may_write: bool = True
    accept_uploads: int | None = None
    drop_downloads: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # large files go over HTTP, as they do where that protocol is not installed
        }

    def use_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the client in this process use it."""
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def asked(self, what: str) -> list[str]:
        """Requests that name something."""
        return [request for request in self.requests if what in request]

    def commit(self, repo: str, branch: str, changes: Files) -> str:
        """Change files of a branch; gives the commit's name."""
        files = self.files.setdefault((repo, branch), {})
        files.update(changes)
        name = hashlib.sha1(f"{repo} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.heads[repo, branch] = name
        return name

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a branch or commit name means, and its files."""
        name = self.heads.get((repo, revision), revision)
        if name in self.commits:
            return name, self.commits[name]
        return ("0" * 40, {}) if repo in self.private and revision == "main" else None


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run one in a thread."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with local_server(handler) as address:
        hub.url = address
        yield hub


def _upload_mode(kind: str, path: str, files: Files) -> dict[str, Any]:
    is_large = kind == "datasets" and path.endswith(".parquet")
    oid = None
    if path in files:
        content = files[path]
        git_blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        oid = hashlib.sha256(content).hexdigest() if is_large else git_blob
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self) -> None:
        parts = self._path().strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "not logged in"})
        elif parts[-1] == "whoami-v2":
            self._answer(200, {"name": "tester", "type": "user"})
        elif parts[-2:] == ["auth-check", "write"]:
            self._answer(200 if self.hub.may_write else 403, {"error": "no write access"})
        elif "resolve" in parts:
            at = parts.index("resolve")
            self._download("/".join(parts[at - 2 : at]), unquote(parts[at + 1]), unquote("/".join(parts[at + 2 :])))
        elif parts[0] == "api" and len(parts) >= 4:
            self._describe(f"{parts[2]}/{parts[3]}", parts[4:])
        else:
            self._answer(404, {"error": "not found"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
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
            repo, branch = "/".join(parts[3:5]), unquote(parts[-1])
            if (repo, "main") in self.hub.heads and (repo, branch) not in self.hub.heads:
                self.hub.commit(repo, branch, self.hub.commits[self.hub.heads[repo, "main"]])
            elif parts[2] == "datasets":
                self.hub.commit(repo, branch, {})
            self._answer(200, {})
        elif "preupload" in parts:
            found = self.hub.at("/".join(parts[3:5]), unquote(parts[-1]))
            asked_for = [file["path"] for file in json.loads(body)["files"]]
            self._answer(
                200, {"files": [_upload_mode(parts[2], path, found[1] if found else {}) for path in asked_for]}
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer(
                200, {"transfer": "basic", "objects": list(map(self._batch_object, json.loads(body)["objects"]))}
            )
        elif "paths-info" in parts:
            found = self.hub.at("/".join(parts[3:5]), unquote(parts[-1]))
            wanted = parse_qs(body.decode()).get("paths", [])
            files_there = found[1] if found else {}
            self._answer(200, [self._entry(name, files_there[name]) for name in wanted if name in files_there])
        elif "commit" in parts and self.hub.fail_commits is not None:
            self._answer(self.hub.fail_commits, {"error": "broken on purpose"})
        elif "commit" in parts:
            self._commit("/".join(parts[3:5]), unquote(parts[-1]), body)
        else:
            self._answer(404, {"error": "not found"})

    def do_PUT(self) -> None:
        digest, body = self._path().rpartition("/")[2], self._body()
        if self.hub.accept_uploads is not None and len(self.hub.large) >= self.hub.accept_uploads:
            self._answer(403, {"error": "broken on purpose"})
            return
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        self._answer(200, {})

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def _describe(self, repo: str, rest: list[str]) -> None:
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        found = self.hub.at(repo, revision)
        if repo not in self.hub.private and not found:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif found is None:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._list(found[1], unquote("/".join(rest[2:])))
        else:
            private = self.hub.private.get(repo, True)
            self._answer(200, {"id": repo, "sha": found[0], "private": private, "siblings": []})

    def _list(self, files: Files, folder: str) -> None:
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        prefix = f"{folder}/" if folder else ""
        below = [name for name in files if name.startswith(prefix)]
        if not below and folder:
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries = [self._entry(name, files[name]) for name in below if recursive or "/" not in name[len(prefix) :]]
        folders = {prefix + name[len(prefix) :].partition("/")[0] for name in below if "/" in name[len(prefix) :]}
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self._answer(200, entries)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.hub.large:
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _batch_object(self, asked: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.hub.large:
            answer["actions"] = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
        return answer

    def _download(self, repo: str, revision: str, path: str) -> None:
        found = self.hub.at(repo, revision)
        if found is None or path not in found[1]:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = found[1][path]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", found[0])
        self.end_headers()
        if self.command == "HEAD":
            return
        if path.endswith(".parquet") and self.hub.drop_downloads > 0:
            self.hub.drop_downloads -= 1
            content = content[: start + (len(content) - start) // 2]
        self.wfile.write(content[start:])

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        changes: Files = {}
        head = self.hub.at(repo, branch)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and head and value.get("parentCommit", head[0]) != head[0]:
                self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
        name = self.hub.commit(repo, branch, changes)
        self._answer(200, {"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{repo}/commit/{name}"})

    # ---- HTTP --------------------------------------------------------------------------------------------------------

    def _path(self) -> str:
        self.hub.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

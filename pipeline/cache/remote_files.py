"""Files at an address (``hf://``, ``s3://``, ``gs://``, ``https://``, …), read through fsspec: never written."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import NoOpCallback
from huggingface_hub.utils.tqdm import disable_progress_bars

from ...errors import DpoCacheError, first_line

PAUSES_S = (1.0, 4.0, 16.0)
"""How long to wait before each new attempt after a failure of the network or the server."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""The extra of this package that brings what fsspec needs for a protocol."""
MAX_LIST_BYTES = 4 << 20
"""Of what a web server lists in a folder."""
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SERVER_ERRORS_FROM = 500
_TOO_MANY_REQUESTS = 429
_CONNECT_TIMEOUT_S, _SILENCE_TIMEOUT_S = 30, 120

Result = TypeVar("Result")


class MissingRemoteFileError(DpoCacheError):
    """There is no such file at the address, or none that may be seen."""


class UnreachableError(DpoCacheError):
    """A file could not be copied: the network or the server fails or refuses, or the disk here does."""


class RefusedError(UnreachableError):
    """The server understood and said no: another attempt would end alike."""


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The files below one address. Safe to use from several threads.

    Attributes:
        address: As it was given.
        commit: The commit it meant when it was opened, where it lies in a repository on the Hub: files read one after
            another are then of one state. Elsewhere None.
    """

    address: str
    commit: str | None
    _filesystem: Any
    _root: str

    @classmethod
    def open(cls, address: str) -> RemoteFiles:
        """Find the protocol's implementation; on the Hub, resolve the revision too.

        Raises:
            DpoCacheError: The protocol is unknown, or its package is not installed (naming the extra that is); or
                there is no such repository or revision.
        """
        protocol = address.partition("://")[0]
        _refuse_secrets(address)
        try:
            # A filesystem of its own: those that fsspec shares remember listings, and pointers change.
            filesystem, root = fsspec.url_to_fs(address, skip_instance_cache=True, **_options(protocol))
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            raise DpoCacheError(
                f"{address} cannot be read: what reads {protocol}:// is not installed ({error})",
                next_step=f"pip install 'dpo-cache[{extra}]'" if extra else None,
            ) from error
        except ValueError as error:
            raise DpoCacheError(
                f"{address} cannot be read: {error}", expected="hf://, s3://, gs:// or https://, or a folder"
            ) from error
        files = cls(address.rstrip("/"), None, filesystem, root.rstrip("/"))
        if protocol != "hf":
            return files
        disable_progress_bars()  # one for each file
        commit, root = files._attempt(lambda: _pinned(filesystem, root), address)
        return cls(files.address, commit, filesystem, root)

    def list_names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; empty where there is no such folder.

        A web server need not list anything, and a bucket's owner may forbid it; then the answer is empty too.
        """

        def listed() -> list[str]:
            return [str(path) for path in self._filesystem.ls(f"{self._root}/{folder}", detail=False)]

        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self._attempt(listed, folder))
        except (MissingRemoteFileError, RefusedError):
            return []

    def fetch(self, name: str, destination: Path, *, max_bytes: int) -> None:
        """Copy a file as it is; after a failure ``destination`` may hold a part of it.

        Args:
            name: Its path below the address.
            destination: Where it goes.
            max_bytes: A larger file is given up as soon as that shows.

        Raises:
            DpoCacheError: It is larger.
            MissingRemoteFileError: There is none.
            UnreachableError: It cannot be read, after several attempts where another one could help.
        """

        bound = _Bound(f"{self.address}/{name}", max_bytes)

        def copy() -> None:
            path = f"{self._root}/{name}"
            try:
                if "file" in self._protocols:  # it is copied without a word on its progress
                    bound.check_local(self._filesystem.info(path))
                self._filesystem.get_file(path, str(destination), callback=bound.of_one_attempt())
            except OSError as error:
                if error.errno not in _DISK_FAULTS:
                    raise
                raise UnreachableError(
                    f"cannot write {destination}: {error.strerror}",
                    next_step="make room (df -h); the same command goes on from there",
                ) from error

        self._attempt(copy, name)

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._filesystem.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _attempt(self, action: Callable[[], Result], what: str) -> Result:
        where = what if what == self.address else f"{self.address}/{what}"
        for pause_s in (*PAUSES_S, None):
            try:
                return action()
            except DpoCacheError:
                raise
            except FileNotFoundError as error:
                raise MissingRemoteFileError(
                    f"there is no {where}, or you may not see it",
                    next_step="check the address, and that you are logged in where it is private",
                ) from error
            except Exception as error:  # each protocol's library raises its own kinds
                if not _may_pass(error):
                    raise RefusedError(
                        f"{where} cannot be read: {first_line(error)}",
                        next_step="check that you are logged in, and allowed to read it",
                    ) from error
                if pause_s is None:
                    raise UnreachableError(
                        f"{where} cannot be read: {first_line(error)}",
                        next_step="the same command goes on from there, once the server answers",
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


class _Bound(NoOpCallback):  # type: ignore[misc]
    """Ends a copy that grows beyond what it may have: at the start where the server tells its size, else on the way.

    The client for the Hub takes its quick ways only with callbacks of this class or of a progress bar's.
    """

    def __init__(self, where: str, max_bytes: int) -> None:
        super().__init__()
        self._where = where
        self._max_bytes = max_bytes

    def of_one_attempt(self) -> _Bound:
        """A new one, which has counted nothing yet."""
        return _Bound(self._where, self._max_bytes)

    def check_local(self, info: dict[str, Any]) -> None:
        """Refuse what is too large, or a pipe or device, which has no size."""
        if info.get("type") != "file":
            raise DpoCacheError(f"{self._where} is not a regular file")
        self.set_size(info["size"])

    def set_size(self, size: int | None) -> None:
        """Told by the server before the first byte, where it tells."""
        if size is not None and size > self._max_bytes:
            raise self._too_large(f"{size:,} bytes")

    def relative_update(self, inc: int = 1) -> None:
        """Told of each part that was copied."""
        self.value += inc
        if self.value > self._max_bytes:
            raise self._too_large("more bytes than it may have")

    def _too_large(self, has: str) -> DpoCacheError:
        return DpoCacheError(f"{self._where} has {has}", expected=f"at most {self._max_bytes:,}")


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    class Response(aiohttp.ClientResponse):
        """Bounds what is read as one piece, which is the list of a folder: files are copied part by part."""

        async def read(self) -> bytes:
            parts, num_bytes = [], 0
            async for part in self.content.iter_any():
                parts.append(part)
                num_bytes += len(part)
                if num_bytes > MAX_LIST_BYTES:
                    raise DpoCacheError(
                        f"the list of {self.url} has no end", expected=f"at most {MAX_LIST_BYTES:,} bytes"
                    )
            self._body = b"".join(parts)
            return self._body

    # Its own limit is five minutes for a whole file, however large.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S)
    # trust_env: proxies, and names and passwords in ~/.netrc
    return {"client_kwargs": {"timeout": timeout, "trust_env": True, "response_class": Response}}


def _refuse_secrets(address: str) -> None:
    """An address stands in messages and in the records of runs: no place for a name, a password or a signature.

    A token may stand where a name does. On the Hub, what follows an ``@`` is a revision.
    """
    parts = urlsplit(address)
    if parts.scheme == "hf":
        return
    if "@" in parts.netloc:
        raise DpoCacheError(
            f"the address of {parts.hostname} carries a user name or a password",
            expected="an address without them; for https:// they can stand in ~/.netrc, and s3:// and gs:// use the "
            "logins of their own tools",
        )
    if parts.scheme in ("http", "https") and parts.query:
        raise DpoCacheError(f"the address of {parts.hostname} carries a query", expected="https://HOST/PATH")


def _pinned(filesystem: Any, root: str) -> tuple[str | None, str]:
    """The commit that a path on the Hub means now, and the path that goes on meaning it."""
    from huggingface_hub import HfApi

    place = filesystem.resolve_path(root)
    if not hasattr(place, "repo_id"):  # a bucket has no commits
        return None, root
    info = HfApi(endpoint=filesystem.endpoint).repo_info(
        place.repo_id, repo_type=place.repo_type, revision=place.revision
    )
    return info.sha, f"{place.repo_type}s/{place.repo_id}@{info.sha}/{place.path}".rstrip("/")


def _may_pass(error: Exception) -> bool:
    """Whether another attempt could end better: not where a server understood and refused."""
    if isinstance(error, PermissionError | IsADirectoryError | NotImplementedError):
        return False
    if type(error).__name__ in ("NoCredentialsError", "OfflineModeIsEnabled", "LocalTokenNotFoundError"):
        return False
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return not isinstance(status, int) or status >= _SERVER_ERRORS_FROM or status == _TOO_MANY_REQUESTS

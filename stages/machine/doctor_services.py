"""The Hugging Face Hub and Weights & Biases: whether they answer, and whether they know the user.

Tokens are used and never shown, not even where an error message would repeat one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from .finding import Finding, Level

_found = partial(Finding, "services")
PATIENCE_S = 6.0
"""For one question, name look-up included, which no timeout of an HTTP library covers."""
Answer = TypeVar("Answer")


def examine_services() -> Iterator[Finding]:
    """Ask; a machine without a network is told so within seconds."""
    reachable = _hub()
    yield reachable
    yield _hub_login(is_reachable=reachable.level is Level.OK)
    yield _wandb_login()


def _hub() -> Finding:
    from huggingface_hub import get_session
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return _found(
            "Hub",
            "HF_HUB_OFFLINE is set: only what is downloaded already can be used",
            Level.NOTE,
            "unset HF_HUB_OFFLINE to download",
        )
    try:
        within(PATIENCE_S, lambda: get_session().head(ENDPOINT, timeout=PATIENCE_S))
    except Exception as fault:  # the client raises errors of its own and of its HTTP library
        return _found(
            "Hub",
            f"{ENDPOINT} does not answer: {_kind_of(fault)}",
            Level.WARNING,
            "local folders and files work without; for the Hub check the network, HTTPS_PROXY, or HF_ENDPOINT",
        )
    return _found("Hub", f"{ENDPOINT} answers")


def _hub_login(*, is_reachable: bool) -> Finding:
    from huggingface_hub import HfApi, get_token

    advice = "for gated models, --push-to-hub and pushing caches: hf auth login"
    if get_token() is None:
        return _found("Hub login", "none", Level.NOTE, advice)
    if not is_reachable:
        return _found("Hub login", "a token is there; nobody could be asked whether it is valid", Level.NOTE)
    try:
        user = within(PATIENCE_S, lambda: HfApi().whoami())
    except Exception as fault:  # as above
        return _found("Hub login", f"a token is there, and refused: {_kind_of(fault)}", Level.WARNING, advice)
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return _found(
            "Hub login", f"{user['name']}, read-only", Level.NOTE, "uploads need a token that may write: hf auth login"
        )
    return _found("Hub login", str(user["name"]))


def _wandb_login() -> Finding:
    try:
        import wandb
    except Exception as fault:  # --with-tracking alone needs it; the section on software has its version
        return _found("wandb login", f"cannot be imported: {_kind_of(fault)}", Level.WARNING, "pip install wandb")
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return _found("wandb login", f"not needed: WANDB_MODE={mode}")
    try:
        wandb.setup(wandb.Settings(silent=True, quiet=True))
        is_known = within(PATIENCE_S, lambda: wandb.login(prompt=False, verify=False))
    except Exception as fault:
        return _found("wandb login", f"unknown: {_kind_of(fault)}", Level.NOTE)
    if is_known:
        return _found("wandb login", "an API key is there")
    return _found("wandb login", "none", Level.NOTE, "for --with-tracking: wandb login")


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """The answer, if it comes in time.

    Raises:
        TimeoutError: It did not.
        Exception: What asking raised.
    """
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as fault:
            answer.set_exception(fault)

    threading.Thread(target=work, daemon=True).start()  # one that hangs must not keep the process
    return answer.result(timeout=seconds)


def _kind_of(fault: Exception) -> str:
    """What went wrong without the words of it: a message may repeat a header."""
    status = getattr(getattr(fault, "response", None), "status_code", None)
    return f"{type(fault).__name__}" + (f", status {status}" if status is not None else "")

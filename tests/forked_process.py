"""Processes that begin with the imports already made, which take seconds and are not what a test is about.

One process imports what most tests need and is forked for each that is asked for. Nothing but modules is shared.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = ["deepspeed.runtime.zero.stage3", "dpo_cache.stages.build", "training_factory"]
ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""Read while DeepSpeed and torch are imported."""


def start_forked(
    function: Callable[..., None], *args: Any, environment: Mapping[str, str], stdout: Path, stderr: Path
) -> ForkServerProcess:
    """Call a function in a process of its own.

    Args:
        function: Top-level function of a module.
        args: What can be pickled.
        environment: All of its variables. What libraries read while they are imported has no effect.
        stdout, stderr: Files for what it prints; may be one.
    """
    process = _prepared().Process(target=_call, args=(function, args, dict(environment), stdout, stderr))
    process.start()
    return process


@cache
def _prepared() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, ON_A_CPU):
        multiprocessing.forkserver.ensure_running()
    return context


def _call(
    function: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], stdout: Path, stderr: Path
) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)

"""Versions of what is installed beside those that were tested, and whether it can be imported."""

from __future__ import annotations

import importlib
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ...errors import first_line
from .finding import Finding, Level

_found = partial(Finding, "software")
IMPORTED = ("torch", "transformers", "datasets", "pyarrow", "deepspeed")
"""Whatever goes wrong with a library that both stages stand on shows when it is imported."""
REPORTED = (*IMPORTED, "liger-kernel", "peft", "bitsandbytes", "huggingface-hub", "wandb", "tensorboard")
OPTIONAL = {
    "peft": "needed for --adapter and --use-lora: pip install peft",
    "bitsandbytes": "needed for --quantization and --use-qlora: pip install bitsandbytes",
    "tensorboard": "needed for --with-tensorboard: pip install tensorboard",
}
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
"""Lies beside the code in a checkout; an installed package comes without."""


def examine_software() -> Iterator[Finding]:
    """Python, and the packages that matter."""
    yield _system()
    yield _python()
    requirements = _requirements()
    tested = tested_versions(CONSTRAINTS)
    for name in REPORTED:
        yield _package(name, requirements.get(name), tested.get(name))


def tested_versions(constraints: Path) -> Mapping[str, str]:
    """The versions of a constraints file by name; none where there is no such file."""
    if not constraints.exists():
        return {}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pinned = [line.partition("#")[0].strip().partition("==") for line in lines]
    return {name: version for name, _, version in pinned if version}


def _system() -> Finding:
    level = Level.OK if sys.platform == "linux" else Level.FATAL
    advice = None if level is Level.OK else "both commands need Linux: flock, process groups and /proc"
    return _found("system", platform.platform(), level, advice)


def _python() -> Finding:
    return _found("python", f"{platform.python_version()} in {sys.prefix}")


def _requirements() -> Mapping[str, Requirement]:
    """What this package asks for, its extras included."""
    declared = map(Requirement, metadata.requires("dpo-cache") or ())
    return {requirement.name: requirement for requirement in declared}


def _package(name: str, requirement: Requirement | None, tested: str | None) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in OPTIONAL:
            return _found(name, "not installed", Level.NOTE, OPTIONAL[name])
        return _fatal(name, "not installed", f"pip install '{requirement or name}'")
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return _fatal(name, f"{version}, too old or too new", f"pip install '{name}{requirement.specifier}'")
    fault = _import_fault(name) if name in IMPORTED else None
    if fault is not None:
        return _fatal(name, f"{version}, cannot be imported: {fault}", f"pip install --force-reinstall {name}")
    if tested is None or version.partition("+")[0] == tested:
        return _found(name, version)
    return _found(
        name,
        f"{version}; tested with {tested}",
        Level.NOTE,
        f"if something fails here: pip install {name}=={tested}",
    )


def _import_fault(name: str) -> str | None:
    logging.disable(logging.WARNING)  # DeepSpeed tells everybody that there is no GPU; we do so once
    try:
        importlib.import_module(name)
    except Exception as fault:  # a broken library raises whatever it likes
        return f"{type(fault).__name__}: {first_line(fault)}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def _fatal(name: str, value: str, advice: str) -> Finding:
    return _found(name, value, Level.FATAL, advice)

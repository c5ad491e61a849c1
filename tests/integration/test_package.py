"""The wheel holds every module and what they need, and they import with nothing but what its dependencies bring."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))  # None: importing it fails
import dpo_cache
assert dpo_cache.__file__.startswith(sys.argv[1]), dpo_cache.__file__
names = [m.name for m in pkgutil.walk_packages(dpo_cache.__path__, "dpo_cache.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def distributions_of(requirements: list[str]) -> set[str]:
    """What pip installs for these requirements, by name."""
    found: set[tuple[str, frozenset[str]]] = set()
    pending = [Requirement(text) for text in requirements]
    while pending:
        requirement = pending.pop()
        wanted = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if wanted in found:
            continue
        found.add(wanted)
        for needed in map(Requirement, metadata.requires(requirement.name) or ()):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                pending.append(needed)
    return {name for name, _ in found}


def modules_beyond_the_dependencies() -> set[str]:
    """The modules that this interpreter has only because it has the extras and the tests' own packages too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = distributions_of(project["dependencies"]) | {"dpo-cache"}
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if module.isidentifier() and not brought & set(map(canonicalize_name, distributions))
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(built.glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    rooms = ("pipeline/", "stages/")
    assert names == {
        f"dpo_cache/{name}"
        for name in tracked_files()
        if name.endswith((".py", ".jinja", ".css", ".js")) and (name.startswith(rooms) or "/" not in name)
    }


def test_every_module_of_the_wheel_imports_without_the_extras(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    blocked = modules_beyond_the_dependencies()
    assert {"matplotlib", "peft", "tensorboard", "pytest"} <= blocked
    assert not {"torch", "numpy", "tokenizers", "dpo_cache"} & blocked
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path), json.dumps(sorted(blocked))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 40


def test_commands_without_a_model_import_no_pytorch() -> None:
    """``dpo-cache info`` of a million pairs answers in half a second, of which imports are most."""
    stages = ["compact", "doctor", "export", "gc", "info", "merge", "pull", "push", "verify", "building.build_config"]
    code = (
        "import importlib, sys\n"
        f"for stage in {stages}:\n"
        "    importlib.import_module(f'dpo_cache.stages.{stage}')\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & sys.modules.keys()\n"
        "    assert not heavy, (stage, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", ["train", "sweep", "build"])
def test_commands_import_deepspeed_only_after_it_was_told_to_be_quiet(stage: str) -> None:
    """Every sweep on a CPU began with DeepSpeed's warning that it had found no accelerator."""
    code = f"import sys, dpo_cache.stages.{stage}; assert 'deepspeed' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_comes_without_heavy_imports() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from dpo_cache.cli import dpo_cache, dpo_train\n"
        "for command in (dpo_cache, dpo_train):\n"
        "    assert CliRunner().invoke(command, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'pyarrow', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The wheel holds every module and what they need, and imports in an environment that has only the dependencies."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
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


def test_every_module_of_the_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 40


@pytest.mark.parametrize(
    "stage", ["compact", "doctor", "export", "gc", "info", "merge", "pull", "push", "verify", "building.build_config"]
)
def test_commands_without_a_model_import_no_pytorch(stage: str) -> None:
    """``dpo-cache info`` of a million pairs answers in half a second, of which imports are most."""
    code = (
        f"import sys, dpo_cache.stages.{stage}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
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

"""Every command and code block of README.md and docs/ does what the page says."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from documentation_blocks import DATA, PARSED_ONLY, PROSE, ROOT, RUN, Block, blocks_of, our_commands, pages
from dpo_cache import cli
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.training.train_config import TrainConfig
from tiny_model import message_pairs, write_rows

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
BLOCKS = [block for page in PAGES.values() for block in blocks_of(page)]
CONFIGS: dict[str, type[Any]] = {"build": BuildConfig, "dpo-train": TrainConfig}
TIMEOUT_S = 900


def _of(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.language in languages]


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in (*RUN, *DATA, *PROSE), f"{block.place}: nobody knows what to do with {block.language}"
        assert block.mark is None or block.mark in PARSED_ONLY, f"{block.place}: there is no mark {block.mark}"


@pytest.mark.parametrize("block", _of("bash"))
def test_a_shell_can_read_every_script(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"


@pytest.mark.parametrize("block", [case for case in _of("bash") if list(our_commands(case.values[0].text))])
def test_every_command_takes_the_options_that_a_page_gives_it(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a command would read is not there: only words and options are looked at.
    monkeypatch.setattr(click.Path, "convert", lambda _self, value, _parameter, _context: Path(value))
    for program, arguments in our_commands(block.text):
        _parse(program, _with_config_files(arguments, block, tmp_path))


@pytest.mark.parametrize(
    "script",
    [
        "dpo-train --cache c --output o --no-such-option 1",
        "torchrun --no-python --nproc-per-node 8 \\\n    dpo-cache build --modle m --dataset d --cache c > log 2>&1",
        "cd somewhere && CUDA_VISIBLE_DEVICES=0 dpo-cache frobnicate",
        "dpo-train --cache c --output o --lora-rank 4  # has no effect without --use-lora",
        "cat > grid.yaml <<'EOF'\n'\nEOF\ndpo-sweep",
    ],
)
def test_a_command_that_would_be_refused_is_found_wherever_it_stands(script: str) -> None:
    ((program, arguments),) = our_commands(script)
    with pytest.raises((click.UsageError, DpoCacheError, AssertionError)):
        _parse(program, arguments)


def test_the_readme_shows_the_table_that_the_demo_prints() -> None:
    rows = runpy.run_path(str(ROOT / "scripts" / "demo" / "table.py"))["ROWS"]
    (shown,) = [block.text for block in BLOCKS if block.page == "README.md" and "run 1, beta 2" in block.text]
    assert [line[:34].strip() for line in shown.splitlines()[1:]] == [title for title, _, _ in rows]


@pytest.mark.parametrize("block", _of("python"))
def test_python_can_read_every_example(block: Block) -> None:
    compile(block.text, block.place, "exec")


@pytest.mark.parametrize("block", _of("json", "yaml"))
def test_json_and_yaml_can_be_read(block: Block) -> None:
    if block.language == "json":
        json.loads(block.text)
    else:
        list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize(
    "page", [name for name in PAGES if any(block.page == name and block.is_run for block in BLOCKS)]
)
def test_a_page_can_be_typed_from_top_to_bottom(page: str, tmp_path: Path, demo_folder: Path, programs: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(demo_folder, folder, symlinks=True)
    blocks = [block for block in BLOCKS if block.page == page and (block.is_run or block.file)]
    steps = tmp_path / "blocks.json"
    steps.write_text(json.dumps([dataclasses.asdict(block) for block in blocks]), encoding="utf-8")
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_page.py"), str(steps)],
        cwd=folder,
        env={**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="session")
def demo_folder(
    tmp_path_factory: pytest.TempPathFactory, reference: Path, pairs_file: Path, shared_cache: Path
) -> Path:
    """What a reader has who has built a first cache: my-model, pairs.jsonl, my-cache, the checkout's scripts, other
    pairs in held-out.jsonl, and two caches of the same reference, part-a and part-b.
    """
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(reference, folder / "my-model")
    shutil.copy(pairs_file, folder / "pairs.jsonl")
    write_rows(folder / "held-out.jsonl", message_pairs(12, seed=1))
    for name in ("my-cache", "part-a", "part-b"):
        shutil.copytree(shared_cache, folder / name)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def _with_config_files(arguments: list[str], block: Block, folder: Path) -> list[str]:
    """Let ``--config`` name the file of this page or checkout that is meant, and an empty one where it is neither."""
    found = list(arguments)
    for position, argument in enumerate(arguments):
        if position == 0 or arguments[position - 1] != "--config":
            continue
        written = [other for other in BLOCKS if other.page == block.page and other.file == argument]
        path = folder / Path(argument).name
        path.write_text(written[0].text if written else "", encoding="utf-8")
        found[position] = str(ROOT / argument if (ROOT / argument).exists() else path)
    return found


def _parse(program: str, arguments: list[str]) -> None:
    command: click.Command = getattr(cli, program.replace("-", "_"))
    name = program
    if isinstance(command, click.Group):
        name, *arguments = arguments
        if name in ("--help", "--version"):
            return
        assert name in command.commands, f"there is no {program} {name}"
        command = command.commands[name]
    try:
        context = command.make_context(name, arguments)
    except click.exceptions.Exit:  # --help
        return
    if name in CONFIGS:
        CONFIGS[name](**{option: value for option, value in context.params.items() if option != "as_json"})

"""Ranks whose launchers started them with other commands or other caches end together, with a message that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import dpo_cache, run
from distributed_run import free_port
from tiny_model import message_pairs, write_rows


def messages_of_ranks(commands: list[list[str]], *, folders: Sequence[Path | None] = (None, None)) -> list[str]:
    """One rank a machine, as a launcher starts them; what each of them says at its end.

    Args:
        commands: Of the two ranks.
        folders: In which they are started; None for this process's own.
    """
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (command, folder) in enumerate(zip(commands, folders, strict=True))
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    return [text[text.rindex("Error: ") :] for text in said]


def test_another_learning_rate_is_refused_by_name(shared_cache: Path, programs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [f"{programs}/dpo-train", f"--cache={shared_cache}", f"--output={output}", "--global-batch-size=8"]
    messages = messages_of_ranks([[*command, "--learning-rate", rate] for rate in ("1e-6", "2e-6")])
    for message in messages:
        assert message.startswith(
            "Error: rank 1 was started with other settings: learning_rate is 2e-06 and rank 0 has 1e-06\n"
        )
    assert not output.exists()


def test_another_cache_is_refused(shared_cache: Path, reference: Path, programs: Path, tmp_path: Path) -> None:
    pairs, other = write_rows(tmp_path / "pairs.jsonl", message_pairs(8, seed=1)), tmp_path / "other"
    run(dpo_cache("build", "--model", reference, "--dataset", pairs, "--cache", other))
    output = tmp_path / "run"
    command = [f"{programs}/dpo-train", f"--output={output}", "--global-batch-size=8"]
    messages = messages_of_ranks([[*command, f"--cache={cache}"] for cache in (shared_cache, other)])
    for message in messages:
        assert message.startswith(f"Error: the mixture that rank 1 reads from {other} is not that of rank 0\n")
    assert {path.name for path in output.iterdir()} == {".lock"}


IMPATIENT_ON_A_MACHINE_OF_ITS_OWN = """
import os, socket, sys

socket.gethostname = lambda: f"node{os.environ['RANK']}"
from dpo_cache.stages.training import output_folder
output_folder.SEEN_WITHIN_S = 1
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


def messages_of_machines(tmp_path: Path, **options: str | Path) -> list[str]:
    """What the ranks of two machines say that have different folders under one relative name."""
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for node in nodes:
        node.mkdir(exist_ok=True)
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", IMPATIENT_ON_A_MACHINE_OF_ITS_OWN, *given, "--global-batch-size", "8"]
    return messages_of_ranks([command, command], folders=nodes)


def test_an_output_folder_that_the_machines_do_not_share_is_refused(shared_cache: Path, tmp_path: Path) -> None:
    """Its checkpoints would be marked complete, and lack what the other machine wrote."""
    for message in messages_of_machines(tmp_path, cache=shared_cache, output="run"):
        assert message.startswith("Error: on node1: --output run is not the folder that rank 0 sees under that name\n")
    assert not (tmp_path / "node1/run").exists()


def test_the_machine_that_has_no_cache_is_named(shared_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0/cache").symlink_to(shared_cache)
    for message in messages_of_machines(tmp_path, cache="cache", output=tmp_path / "run"):
        assert message.startswith("Error: on node1: there is no cache in cache: cache.json is missing\n")

"""Ranks whose launchers started them with other commands or other caches end together, with a message that says so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from commands import dpo_cache, dpo_train, run
from distributed_run import free_port
from tiny_model import message_pairs, write_rows


def messages_of_ranks(commands: list[list[str]]) -> list[str]:
    """One rank a command, as a launcher starts them; what each of them says at its end."""
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    return [text[text.rindex("Error: ") :] for text in said]


def test_another_learning_rate_is_refused_by_name(shared_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = dpo_train("--cache", shared_cache, "--output", output, "--global-batch-size", 8)
    messages = messages_of_ranks([[*command, "--learning-rate", rate] for rate in ("1e-6", "2e-6")])
    for message in messages:
        assert message.startswith(
            "Error: rank 1 was started with other settings: learning_rate is 2e-06 and rank 0 has 1e-06\n"
        )
    assert not output.exists()


def test_another_cache_is_refused(shared_cache: Path, reference: Path, tmp_path: Path) -> None:
    pairs, other = write_rows(tmp_path / "pairs.jsonl", message_pairs(8, seed=1)), tmp_path / "other"
    run(dpo_cache("build", "--model", reference, "--dataset", pairs, "--cache", other))
    output = tmp_path / "run"
    messages = messages_of_ranks(
        [dpo_train("--cache", cache, "--output", output, "--global-batch-size", 8) for cache in (shared_cache, other)]
    )
    for message in messages:
        assert message.startswith(f"Error: the mixture that rank 1 reads from {other} is not that of rank 0\n")
    assert {path.name for path in output.iterdir()} == {".lock"}

"""The trained model on its way to a Hub: the real client, a server of our own that fails on purpose."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import dpo_train, run
from hub_server import TOKEN, HubServer, hub_server

RECIPE = ("--global-batch-size", 8, "--max-steps", 2, "--learning-rate", 1e-3)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def test_a_failed_upload_leaves_the_run_successful_and_its_command_repeats_it(
    shared_cache: Path, tmp_path: Path, hub: HubServer
) -> None:
    output = tmp_path / "beta-5"
    hub.fail_commits = 500
    command = dpo_train("--cache", shared_cache, "--output", output, *RECIPE, "--push-to-hub", "--num-gpus", 2)
    report = run(command, environment=hub.environment)
    assert report["steps"] == 2
    assert report["hub"]["url"] is None
    assert "500" in report["hub"]["failure"]
    assert hub.private == {"tester/beta-5": True}
    first_commit = next(number for number, asked in enumerate(hub.requests) if "/commit/" in asked)
    assert "GET /api/models/tester/beta-5/auth-check/write" in hub.requests[:first_commit]
    assert any(asked.startswith("POST /api/models/tester/beta-5/branch/beta-5") for asked in hub.requests)
    assert not hub.files

    hub.fail_commits = None
    repeat = shlex.split(report["hub"]["repeat_with"])
    assert repeat[:2] == ["hf", "upload"]
    repeat[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(repeat, check=True, env={**os.environ, **hub.environment}, timeout=120, capture_output=True)
    uploaded = hub.files["tester/beta-5", "beta-5"]
    assert uploaded == {file.name: file.read_bytes() for file in (output / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= uploaded.keys()

    card = uploaded["README.md"].decode()
    assert "\nlibrary_name: transformers\n" in card
    assert '"name": "dpo_norm"' in card
    assert "| cache identity | `" in card
    assert "| train_loss | 0." in card
    for name, content in uploaded.items():
        for secret in (TOKEN, str(tmp_path), str(shared_cache), str(tmp_path.parent)):
            assert secret.encode() not in content, name


def test_an_upload_that_works_is_reported_with_its_address(shared_cache: Path, tmp_path: Path, hub: HubServer) -> None:
    place = ("--hub-model-id", "lab/tuned", "--hub-revision", "main", "--no-hub-private")
    lora = ("--use-lora", "--lora-rank", 2, "--merge")
    command = dpo_train("--cache", shared_cache, "--output", tmp_path / "run", *RECIPE, *lora, "--push-to-hub", *place)
    report = run(command, environment=hub.environment)
    assert report["hub"]["url"] == f"{hub.url}/lab/tuned/commit/{hub.heads['lab/tuned', 'main']}"
    assert hub.private == {"lab/tuned": False}
    assert "model.safetensors" in hub.files["lab/tuned", "main"]


def test_who_may_not_write_is_told_before_a_model_is_loaded(shared_cache: Path, tmp_path: Path, hub: HubServer) -> None:
    hub.may_write = False
    command = dpo_train("--cache", shared_cache, "--output", tmp_path / "run", *RECIPE, "--push-to-hub")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **hub.environment}
    )
    assert done.returncode == 1, done.stderr
    assert "Error: --push-to-hub: nothing could be uploaded as run: 403" in done.stderr
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "run/step0.json").exists()

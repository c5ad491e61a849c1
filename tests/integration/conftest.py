"""One tiny reference, one dataset and one cache that many tests read."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import dpo_cache, run
from program_stand_ins import stand_ins
from tiny_model import SHARED_DATA, message_pairs, tiny_tokenizer, write_rows, write_tiny_model

NUM_PAIRS = 40


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; tests must not change it."""
    return write_tiny_model(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs as JSON lines."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", message_pairs(NUM_PAIRS))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory, reference: Path, pairs_file: Path) -> Path:
    """A cache of the forty pairs; tests must not change it."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache))
    return cache


@pytest.fixture
def cache(shared_cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache that the test may spoil."""
    copied = tmp_path / "cache"
    shutil.copytree(shared_cache, copied)
    return copied


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with our programs for scripts and launchers; without a GPU, such as begin with their imports made."""
    if torch.cuda.is_available():
        yield Path(sys.executable).parent
        return
    with stand_ins(tmp_path_factory.mktemp("programs")) as folder:
        yield folder


def real_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a sample of real preference data that lies beside the checkout."""
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the sample data {path.name} is not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def real_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer was trained on real answers."""
    rows = real_rows("hh_harmless")
    return write_tiny_model(
        tmp_path_factory.mktemp("real-reference"), tokenizer=tiny_tokenizer([row["chosen"] for row in rows], 2048)
    )

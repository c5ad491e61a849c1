"""Every test of this folder is marked ``gpu``, and skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import dpo_cache, run
from tiny_model import message_pairs, write_rows, write_tiny_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads of a size that flex_attention is the default for."""
    return write_tiny_model(tmp_path_factory.mktemp("reference"), hidden_size=4 * 64, intermediate_size=512)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", message_pairs(40, pairs_per_prompt=2))


@pytest.fixture(scope="session")
def bf16_cache(tmp_path_factory: pytest.TempPathFactory, reference: Path, pairs_file: Path) -> Path:
    """A cache as a GPU makes it unless told otherwise; tests must not change it."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache))
    return cache

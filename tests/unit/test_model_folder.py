"""A model's files from the Hub: those that are read, once, and a word where they do not come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.tokenizer import load_tokenizer
from dpo_cache.stages.hub import model_folder
from dpo_cache.stages.hub.model_folder import find_model_folder
from hub_server import HubServer, hub_server
from huggingface_hub import constants
from tiny_model import write_tiny_model

REPO = "owner/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with a model, and much beside it that nobody needs."""
    model = write_tiny_model(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    unneeded = {
        "README.md": b"A model.",
        "consolidated.safetensors": b"the weights once more",
        "original/model.safetensors": b"and once more",
        "checkpoint-500/adapter_model.safetensors": b"half-trained",
    }
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server() as server:
        server.use_here(monkeypatch)
        server.private[REPO] = False
        server.commit(REPO, "main", files | unneeded)
        yield server


def test_only_what_is_read_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    found = find_model_folder(REPO, None)
    assert {file.name for file in found.folder.rglob("*") if file.is_file()} == {
        file.name for file in (tmp_path / "model").iterdir()
    }
    assert not hub.asked("consolidated")
    assert not hub.asked("checkpoint-500")


def test_the_tokenizer_of_a_model_that_was_downloaded_asks_the_hub_for_nothing(hub: HubServer) -> None:
    found = find_model_folder(REPO, None)
    before = len(hub.requests)
    load_tokenizer(REPO, found.commit, trust_remote_code=False)
    assert hub.requests[before:] == []


@pytest.mark.parametrize("fault", [RuntimeError("the stream broke off"), OSError(28, "No space left on device")])
def test_a_download_that_breaks_off_is_told_from_a_model_that_is_not_there(
    hub: HubServer, fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DpoCacheError, match="there is no folder 'owner/other', and the Hub did not give a model of that name"
    ):
        find_model_folder("owner/other", None)

    def breaks_off(*_: object, **__: object) -> str:
        raise fault

    monkeypatch.setattr(model_folder, "snapshot_download", breaks_off)
    with pytest.raises(DpoCacheError, match=f"the files of {REPO} could not be fetched from the Hub: ") as broken:
        find_model_folder(REPO, None)
    assert "goes on from there" in str(broken.value.next_step)

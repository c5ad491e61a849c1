"""From settings to the files of a reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building.build_cache import recorded_environment
from dpo_cache.stages.building.build_config import BuildConfig
from dpo_cache.stages.building.build_reference import resolve_reference
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_model import write_tiny_model


def write_adapter(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    save_file({"lora_A": torch.full((2,), value)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def config_of(model: Path, **settings: str | None) -> BuildConfig:
    return BuildConfig(model=str(model), dataset=("rows.jsonl",), cache=Path("cache"), **settings)  # type: ignore[arg-type]


def test_an_adapter_of_the_hub_is_taken_at_its_revision_and_its_commit_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--owner--lora"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for number, (name, commit) in enumerate(commits.items()):
        write_adapter(repository / "snapshots" / commit, float(number))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    newest, tagged = (
        resolve_reference(config_of(model, adapter="owner/lora", adapter_revision=name)) for name in (None, "v1")
    )
    assert newest.identity.adapter_sha256 != tagged.identity.adapter_sha256
    recorded = recorded_environment(tagged)
    assert (recorded["adapter"], recorded["adapter_commit"]) == ("owner/lora", commits["v1"])

    copied = shutil.copytree(repository / "snapshots" / commits["v1"], tmp_path / "copied")
    assert resolve_reference(config_of(model, adapter=str(copied))).identity == tagged.identity


def test_the_tokenizer_is_recorded_by_hub_id_and_commit_and_a_local_one_by_a_path_that_lasts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    commit = "c" * 40
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    config = BuildConfig(model="owner/tiny", dataset=("rows.jsonl",), cache=Path("cache"), trust_remote_code=True)
    for settings in (
        resolve_reference(config).tokenization,
        resolve_reference(config_of(model, tokenizer="owner/tiny")).tokenization,
    ):
        assert (settings.tokenizer, settings.tokenizer_revision) == ("owner/tiny", commit)
    assert resolve_reference(config).tokenization.trust_remote_code
    local = resolve_reference(config_of(model, tokenizer="model")).tokenization
    assert (local.tokenizer, local.tokenizer_revision) == (str(tmp_path / "model"), None)
    assert not local.trust_remote_code


def test_a_model_with_code_of_its_own_is_another_reference_where_that_code_runs(model: Path) -> None:
    (model / "modeling_own.py").write_text("raise AssertionError('only its bytes are read')\n")
    config = json.loads((model / "config.json").read_text())

    def resolved(auto_map: dict[str, str], *, trust_remote_code: bool) -> str:
        (model / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        settings = BuildConfig(
            model=str(model), dataset=("rows.jsonl",), cache=Path("cache"), trust_remote_code=trust_remote_code
        )
        return resolve_reference(settings).identity.digest

    own = {"AutoModelForCausalLM": "modeling_own.Own"}
    assert resolved(own, trust_remote_code=True) != resolved(own, trust_remote_code=False)
    elsewhere = {"AutoConfig": "org/repo--configuration_own.OwnConfig"}
    resolved(elsewhere, trust_remote_code=False)
    with pytest.raises(DpoCacheError, match="takes the model's code from another repository"):
        resolved(elsewhere, trust_remote_code=True)


def test_a_revision_without_an_adapter_or_of_a_folder_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match="--adapter-revision has no effect without --adapter"):
        config_of(model, adapter_revision="v1")
    adapter = write_adapter(tmp_path / "adapter", 1.0)
    with pytest.raises(DpoCacheError, match="the revision v1 has no meaning for the folder"):
        resolve_reference(config_of(model, adapter=str(adapter), adapter_revision="v1"))

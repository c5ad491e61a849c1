"""Weights are written one file at a time, under the names that checkpoints of their architecture use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training import model_export
from dpo_cache.pipeline.training.host_memory import fix_mmap_threshold
from dpo_cache.pipeline.training.tensor_headers import TensorHeader, read_headers
from dpo_cache.pipeline.training.weight_files import plan_files, saved_weights, write_weights
from peak_memory import PeakMemory
from safetensors.torch import load_file
from training_factory import export_plainly, make_engine, tiny_policy, write_llama
from transformers import AutoModelForCausalLM, HrmTextConfig, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3Config

MIB = 2**20
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTRAL = MixtralConfig(**SMALL, num_local_experts=4)
CONFIGS = {
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "experts fused while loading": MIXTRAL,
    "experts and norms": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "projections split while loading": HrmTextConfig(**SMALL),
}


def _write(model: Any, folder: Path, max_file_size: str) -> dict[str, TensorHeader]:
    folder.mkdir()
    return write_weights(
        model, folder, dtype=torch.float32, max_file_size=max_file_size, master_of=None, wait=lambda: None
    )


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("max_file_size", ["4KB", "5GB"])
def test_the_files_hold_what_transformers_would_save(tmp_path: Path, kind: str, max_file_size: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model.save_pretrained(tmp_path / "expected")
    headers = _write(model, tmp_path / "found", max_file_size)
    expected, found = _read(tmp_path / "expected"), _read(tmp_path / "found")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert headers == read_headers(tmp_path / "found")
    files = sorted(path.name for path in (tmp_path / "found").glob("*.safetensors"))
    if max_file_size == "5GB":
        assert files == ["model.safetensors"]
        return
    assert len(files) > 2
    index = json.loads((tmp_path / "found" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize(
    ("kind", "together"), [("experts fused while loading", 1), ("projections split while loading", 9)]
)
def test_only_weights_that_the_files_join_are_gathered_together(kind: str, together: int) -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind])
    plan = plan_files(model, saved_weights(model, torch.float32), "5GB")
    assert max(len(group.names) for group in plan.groups) <= together


def test_weights_under_the_names_of_an_adapters_wrapper_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_config(MIXTRAL)
    wrapped = [
        (name.replace("experts.", "experts.base_layer."), [parameter], None)
        for name, parameter in model.named_parameters()
    ]
    monkeypatch.setattr("dpo_cache.pipeline.training.weight_files.merged_parameters", lambda _: wrapped)
    with pytest.raises(DpoCacheError, match="the trained weights are not those of a MixtralForCausalLM"):
        saved_weights(model, torch.float32)


def growth_in_saving(folder: str) -> list[float]:
    """MiB that a rank needs at most while it saves, and the size of the largest file."""
    fix_mmap_threshold()  # as a run does
    model_export.MAX_SHARD_SIZE = "15MB"
    growth = []
    for name in ("warm", "large"):  # imports, thread pools and the like are not the model's
        base = Path(folder) / name
        engine = make_engine(Path(folder), zero_stage=3, num_ranks=2, load_from=base)
        with PeakMemory() as memory:
            export_plainly(engine, Path(folder) / f"saved_{name}", base=base)
        growth.append(memory.growth)
    largest = max(file.stat().st_size for file in (Path(folder) / "saved_large").glob("*.safetensors"))
    return [growth[-1], largest / MIB]


def test_two_ranks_hold_no_more_than_a_file_and_a_weight_while_they_save(tmp_path: Path) -> None:
    write_llama(tmp_path / "warm", layers=1, hidden_size=64)
    size = write_llama(tmp_path / "large", layers=3, hidden_size=1024) / MIB
    (writing, file), (helping, _) = run_ranks(growth_in_saving, str(tmp_path), num_ranks=2)
    assert file < size / 10
    assert writing < 2 * file + 25
    assert helping < 2 * file + 25


def test_a_model_in_one_file_has_no_index(tmp_path: Path) -> None:
    _write(tiny_policy(), tmp_path / "model", "5GB")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]

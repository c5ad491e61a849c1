"""The exported model is the trained one, whole, in the base checkpoint's dtype."""

from __future__ import annotations

import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.training.lora_adapter import LoraSettings
from dpo_cache.pipeline.training.model_export import (
    _follow_umask,
    _put_in_place,
    _restore_config,
)
from dpo_cache.pipeline.training.model_tokenizer import ModelTokenizer
from dpo_cache.pipeline.training.tensor_headers import read_headers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from training_factory import export_plainly, make_engine, policy_logits, random_pairs, tiny_policy, train_steps
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BATCHES = [random_pairs(4, seed=step) for step in range(2)]
LORA = LoraSettings(rank=2, alpha=2.0, target_modules=("q_proj",), seed=0)
IDS = torch.tensor([[5, 9, 3, 17, 60]])


def _write_base(folder: Path, *, tied: bool) -> Path:
    """A bf16 base checkpoint with a tokenizer."""
    policy = tiny_policy(tied=tied).bfloat16()
    policy.config.use_cache = True
    policy.config.attention_dropout = 0.1
    policy.save_pretrained(folder)
    words = {f"w{number}": number for number in range(64)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    return folder


def train_and_export(folder: str) -> list[Any]:
    """Export after two steps, replacing a stale model; what the policy itself says stays to compare with."""
    answers = []
    for stage, tied in ((3, False), (3, True), (1, False)):
        base = Path(folder) / f"base_{tied}"
        output = Path(folder) / f"{stage}_{tied}"
        engine = make_engine(Path(folder), zero_stage=stage, num_ranks=2, tied=tied)
        train_steps(engine, BATCHES, learning_rate=1e-2, micro_steps=1)
        if engine.rank == 0:
            (output / "model").mkdir(parents=True)
            (output / "model" / "stale").touch()
        torch.distributed.barrier()
        export_plainly(engine, output / "model", base=base)
        answers.append(policy_logits(engine, IDS))
    return answers


def test_a_trained_model_loads_with_from_pretrained_and_answers_as_the_policy(tmp_path: Path) -> None:
    for tied in (False, True):
        _write_base(tmp_path / f"base_{tied}", tied=tied)
    answers, _ = run_ranks(train_and_export, str(tmp_path), num_ranks=2)
    for (stage, tied), expected in zip(((3, False), (3, True), (1, False)), answers, strict=True):
        output, base = tmp_path / f"{stage}_{tied}", tmp_path / f"base_{tied}"
        assert [path.name for path in output.iterdir()] == ["model"]
        assert not (output / "model" / "stale").exists()
        model, loading = AutoModelForCausalLM.from_pretrained(output / "model", output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        assert model.dtype == torch.bfloat16
        assert model.config.tie_word_embeddings == tied
        assert read_headers(output / "model") == read_headers(base)
        with torch.no_grad():
            found = model.float()(input_ids=IDS).logits
            untrained = tiny_policy(tied=tied)(input_ids=IDS).logits
        # Rounded to bf16 on the way; training moved the answers much further.
        expected_logits = torch.tensor(expected).view_as(found)
        assert (found - expected_logits).abs().max() < 0.1
        assert (untrained - expected_logits).abs().max() > 0.3
        assert PreTrainedTokenizerFast.from_pretrained(output / "model").chat_template == "{{ messages }}"
        config = json.loads((output / "model" / "config.json").read_text())
        assert (config["dtype"], config["use_cache"], config["attention_dropout"]) == ("bfloat16", True, 0.1)


def test_what_was_changed_for_training_only_is_as_in_the_base_again_in_parts_of_the_config_too(tmp_path: Path) -> None:
    trained = {"use_cache": False, "attention_dropout": 0.0, "hidden_size": 8}
    before = {
        **{"hidden_size": 8, "attention_dropout": 0.25},
        **{"text_config": {"hidden_size": 8, "use_cache": True}, "rope_parameters": {"rope_theta": 1e4}},
    }
    for name, content in (
        ("base.json", before),
        ("written.json", {**trained, "text_config": trained, "rope_parameters": {"rope_theta": 1e4}}),
    ):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    _restore_config(tmp_path / "written.json", tmp_path / "base.json", torch.bfloat16)
    written = json.loads((tmp_path / "written.json").read_text(encoding="utf-8"))
    assert written == {**before, "dtype": "bfloat16"}


def test_a_folder_within_a_model_can_be_entered_by_whoever_may_read_its_files(tmp_path: Path) -> None:
    """Named chat templates lie in one; no user but root could save a model with them."""
    named = tmp_path / "additional_chat_templates"
    named.mkdir(mode=0o700)
    files = [tmp_path / "model.safetensors", named / "tool_use.jinja"]
    for file in files:
        file.touch(mode=0o600)
    umask = os.umask(0o027)
    try:
        _follow_umask(tmp_path)
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (named, *files)] == [0o750, 0o640, 0o640]


def test_a_model_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves the new name with nothing behind it, and the old model gone."""
    for name in ("model", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    synced: list[Path] = []
    monkeypatch.setattr(durable_file, "_sync_file", synced.append)
    monkeypatch.setattr(durable_file.operations, "sync_folder", synced.append)
    _put_in_place(tmp_path / "model.tmp", tmp_path / "model")
    assert synced == [tmp_path / "model.tmp/model.safetensors", tmp_path / "model.tmp", tmp_path]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == {
        tmp_path / "model/model.safetensors": b"model.tmp"
    }


def export_of_rounded_training(folder: str) -> list[Any]:
    """A float32 checkpoint trained in bfloat16 by updates below its last bit, at every stage and with an adapter."""
    base = Path(folder) / "base"
    largest = []
    for stage, lora in ((0, None), (1, None), (2, None), (3, None), (3, LORA)):
        engine = make_engine(Path(folder), zero_stage=stage, num_ranks=2, dtype="bfloat16", lora=lora, load_from=base)
        train_steps(engine, BATCHES, learning_rate=1e-6, micro_steps=1)
        output = Path(folder) / f"{stage}_{lora is not None}"
        export_plainly(engine, output, base=base)
        if engine.rank == 0:
            trained, before = (load_file(path / "model.safetensors") for path in (output, base))
            start = {name: weight if lora else weight.bfloat16().float() for name, weight in before.items()}
            moved = [(trained[name] - start[name]).abs().max() for name in before]
            largest.append([float(max(moved)), sum(bool(one) for one in moved)])
    return largest


def test_a_checkpoint_more_precise_than_the_computation_keeps_its_precision(tmp_path: Path) -> None:
    """The optimizer's float32 weights are written, not what bfloat16 makes of them."""
    tiny_policy().save_pretrained(tmp_path / "base")
    Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0")).save(str(tmp_path / "base" / "tokenizer.json"))
    largest, _ = run_ranks(export_of_rounded_training, str(tmp_path), num_ranks=2)
    *whole, adapter = largest
    # What two updates at a rate of 1e-6 can do; rounding to bfloat16 moves a weight of 0.5 by up to 1e-3.
    assert [0 < moved < 3e-6 for moved, _ in largest] == [True] * 5
    assert all(count > 10 for _, count in whole)
    assert adapter[1] == len([name for name in load_file(tmp_path / "base" / "model.safetensors") if "q_proj" in name])


def export_in_float16(folder: str) -> list[Any]:
    engine = make_engine(Path(folder), zero_stage=1, num_ranks=1, dtype="bfloat16", load_from=Path(folder) / "base")
    train_steps(engine, BATCHES, learning_rate=1e-4, micro_steps=1)
    export_plainly(engine, Path(folder) / "model", base=Path(folder) / "base")
    return []


def test_a_float16_checkpoint_is_more_precise_than_bfloat16_too(tmp_path: Path) -> None:
    tiny_policy().half().save_pretrained(tmp_path / "base")
    run_ranks(export_in_float16, str(tmp_path), num_ranks=1)
    saved = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert saved.dtype == torch.float16
    assert (saved != saved.bfloat16().half()).float().mean() > 0.5


def export_to_a_full_disk(folder: str) -> list[Any]:
    engine = make_engine(Path(folder), zero_stage=0, num_ranks=1)
    base = Path(folder) / "base"
    words = {f"w{number}": number for number in range(10_000)}
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    faults = []
    # Room for the config, not for weights; then for weights, not for a tokenizer, whose library has errors of its own.
    for room, tokenizer in (8_000, None), (80_000, ModelTokenizer(base_folder=base, other=large)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            export_plainly(engine, Path(folder) / "model", base=base, tokenizer=tokenizer)
        except DpoCacheError as fault:
            faults.append(str(fault))
    return faults


def test_a_disk_without_room_is_named_and_no_half_of_a_model_stays(tmp_path: Path) -> None:
    _write_base(tmp_path / "base", tied=False)
    (faults,) = run_ranks(export_to_a_full_disk, str(tmp_path), num_ranks=1)
    assert len(faults) == 2
    for fault in faults:
        assert f"the model could not be written to {tmp_path / 'model'}" in fault
        assert "File too large" in fault
        assert "free some space" in fault
    assert not list(tmp_path.glob("model*"))

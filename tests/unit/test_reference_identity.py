"""Whatever can change a log-probability changes the identity; nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_factory import make_identity
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.reference_identity import ReferenceIdentity, differences, identify_reference
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "text_config": {"sliding_window": 16, "dtype": "float32"},
    "quantization_config": {"quant_method": "x", "dtype": "int8"},
    "torch_dtype": "bfloat16",
    "attention_dropout": 0.1,
    "use_cache": True,
    "transformers_version": "5.0.0",
}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.arange(4.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, value: float = 1.0, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"lora_A": torch.full((2,), value)}, folder / "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "somewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def identify(folder: Path, *, adapter: Path | None = None, **changes: Any) -> ReferenceIdentity:
    arguments: dict[str, Any] = {
        "weight_dtype": "float32",
        "compute_dtype": "float32",
        "attention": "sdpa",
        "scoring_version": 1,
    }
    return identify_reference(folder, adapter_folder=adapter, **(arguments | changes))


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one member, named by a dotted path, set."""
    name, _, rest = path.partition(".")
    return config | {name: changed(config.get(name, {}), rest, value) if rest else value}


def test_golden_identity() -> None:
    """Another digest here means that no existing cache is found again: never by accident."""
    assert make_identity().digest == "c5ec5daf5cae3fc572057404868b53c9a78dba0112e7f7d51a36d148dd4117ef"
    assert (
        make_identity(quantization="nf4").digest == "0844cff43864dd87299237f4304a5051b18af9f2492d6d554283cdae8f9633cd"
    )


def test_golden_identity_of_remote_code() -> None:
    identity = make_identity(remote_code_sha256="d" * 64)
    assert identity.to_json() == make_identity().to_json() | {"remote_code_sha256": "d" * 64}
    assert identity.digest == "5ac744948c1c53f6c12c3f91a5d85e3e52232c66a14faf6ae106fe871495179b"


def test_weights_as_they_are_leave_no_trace_of_quantization() -> None:
    """Caches that were begun before there was such a field are found again."""
    assert "quantization" not in make_identity().to_json()
    assert make_identity(quantization="nf4").to_json() == make_identity().to_json() | {"quantization": "nf4"}
    assert differences(make_identity(), make_identity(quantization="nf4")) == [("quantization", None, "nf4")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rope_theta", 500000.0),
        ("rope_scaling.factor", 4.0),
        ("hidden_size", 16),
        ("text_config.sliding_window", 32),
        ("quantization_config.dtype", "int4"),
        ("architectures", ["LlamaModel"]),
        ("pad_token_id", 0),
        ("never_heard_of", 1),
    ],
)
def test_config_that_counts_is_named_with_both_values(tmp_path: Path, path: str, value: Any) -> None:
    ours = identify(write_model(tmp_path / "model", CONFIG))
    theirs = identify(write_model(tmp_path / "model", changed(CONFIG, path, value)))
    assert ours.digest != theirs.digest
    assert [(name, theirs_) for name, _, theirs_ in differences(ours, theirs)] == [(f"config.{path}", value)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("torch_dtype", "float32"),
        ("dtype", "float32"),
        ("attention_dropout", 0.5),
        ("resid_pdrop", 0.5),
        ("use_cache", False),
        ("transformers_version", "6.0.0"),
        ("_name_or_path", "elsewhere"),
        ("_attn_implementation", "eager"),
        ("id2label", {"0": "no"}),
        ("eos_token_id", 7),
        ("text_config.dtype", "bfloat16"),
        ("text_config.attention_dropout", 0.5),
    ],
)
def test_config_that_cannot_change_a_logprob_does_not_count(tmp_path: Path, path: str, value: Any) -> None:
    ours = identify(write_model(tmp_path / "model", CONFIG))
    theirs = identify(write_model(tmp_path / "elsewhere", changed(CONFIG, path, value)))
    assert ours == theirs
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_dtype", "bfloat16"),
        ("compute_dtype", "bfloat16"),
        ("attention", "eager"),
        ("scoring_version", 2),
        ("weights_sha256", "c" * 64),
        ("adapter_sha256", "d" * 64),
        ("quantization", "nf4"),
    ],
)
def test_every_other_field_counts_and_is_named(field: str, value: Any) -> None:
    ours, theirs = make_identity(), make_identity(**{field: value})
    assert ours.digest != theirs.digest
    assert differences(ours, theirs) == [(field, getattr(ours, field), value)]


def test_an_adapter_counts_by_its_bytes_and_settings_and_not_by_where_it_came_from(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", CONFIG)
    base = identify(model)
    adapted = identify(model, adapter=write_adapter(tmp_path / "a"))
    assert adapted.digest != base.digest
    moved = write_adapter(
        tmp_path / "b", base_model_name_or_path="elsewhere", lora_dropout=0.5, target_modules=["v_proj", "q_proj"]
    )
    assert identify(model, adapter=moved).digest == adapted.digest
    assert identify(model, adapter=write_adapter(tmp_path / "c", value=2.0)).digest != adapted.digest
    assert identify(model, adapter=write_adapter(tmp_path / "d", lora_alpha=32)).digest != adapted.digest
    (tmp_path / "d" / "adapter_model.safetensors").unlink()
    with pytest.raises(DpoCacheError, match=r"adapter_model\.safetensors is missing"):
        identify(model, adapter=tmp_path / "d")


def test_weights_that_a_config_takes_from_other_files_are_refused(tmp_path: Path) -> None:
    """transformers would load those, and the digest would be that of the files with the usual names."""
    model = write_model(tmp_path / "model", CONFIG | {"transformers_weights": "others/model.safetensors"})
    with pytest.raises(DpoCacheError, match=r"takes the weights from 'others/model\.safetensors'"):
        identify(model)


def test_code_that_a_model_brings_along_counts(tmp_path: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    model = write_model(tmp_path / "model", config)
    (model / "modeling_own.py").write_text("x = 1\n")
    before = identify(model)
    (model / "modeling_own.py").write_text("x = 2\n")
    assert [name for name, _, _ in differences(before, identify(model))] == [
        "config.auto_map_code_sha256.modeling_own.py"
    ]


def test_code_that_runs_in_the_place_of_a_class_of_transformers_is_another_reference(tmp_path: Path) -> None:
    """With --trust-remote-code a model's own code computes the values, without it the class of its model_type."""
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    model = write_model(tmp_path / "model", config)
    (model / "layers").mkdir()
    for name in ("modeling_own.py", "layers/attention.py"):
        (model / name).write_text("x = 1\n")
    native, own = identify(model), identify(model, trust_remote_code=True)
    assert "remote_code_sha256" not in native.to_json()
    assert [(name, ours) for name, ours, _ in differences(native, own)] == [("remote_code_sha256", None)]
    (model / "layers/attention.py").write_text("x = 2\n")
    assert identify(model) == native
    assert [name for name, *_ in differences(own, identify(model, trust_remote_code=True))] == ["remote_code_sha256"]


@pytest.mark.parametrize("auto_map", [None, {"AutoTokenizer": ["tok.Own", None]}, {"AutoModel": "modeling.Own"}])
def test_leave_to_run_code_is_no_matter_where_none_computes_the_values(
    tmp_path: Path, auto_map: dict[str, Any] | None
) -> None:
    model = write_model(tmp_path / "model", CONFIG | ({"auto_map": auto_map} if auto_map else {}))
    (model / "tok.py").write_text("x = 1\n")
    assert identify(model, trust_remote_code=True) == identify(model)


def test_code_of_another_repository_is_refused_where_it_would_run(tmp_path: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoConfig": "org/repo--configuration_own.OwnConfig"}}
    model = write_model(tmp_path / "model", config)
    identify(model)
    with pytest.raises(DpoCacheError, match=r"'org/repo--configuration_own\.OwnConfig'") as refused:
        identify(model, trust_remote_code=True)
    assert "leave --trust-remote-code out" in str(refused.value.next_step)


def test_infinity_in_a_config_has_one_identity_however_it_is_spelled(tmp_path: Path) -> None:
    raw = write_model(tmp_path / "raw", CONFIG | {"time_step_limit": [0.0, float("inf")]})
    tagged = write_model(tmp_path / "tagged", CONFIG | {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert identify(raw) == identify(tagged)


def test_an_identity_comes_back_from_json() -> None:
    for identity in (
        make_identity(adapter_sha256="e" * 64),
        make_identity(quantization="nf4"),
        make_identity(quantization="nf4", remote_code_sha256="d" * 64),
    ):
        text = json.dumps(identity.to_json())
        assert ReferenceIdentity.from_json(json.loads(text), source=Path("cache.json")) == identity


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention", 1),
        ("config", []),
        ("scoring_version", "1"),
        ("adapter_sha256", 3),
        ("weights_sha256", None),
        ("quantization", None),
        ("remote_code_sha256", None),
    ],
)
def test_an_identity_of_other_types_is_refused(field: str, value: Any) -> None:
    with pytest.raises(DpoCacheError, match=field):
        ReferenceIdentity.from_json(make_identity().to_json() | {field: value}, source=Path("cache.json"))


def test_an_identity_with_a_field_more_or_less_is_refused() -> None:
    whole = make_identity().to_json()
    for wrong in (whole | {"extra": 1}, {name: value for name, value in whole.items() if name != "attention"}):
        with pytest.raises(DpoCacheError, match="lacks or does not know"):
            ReferenceIdentity.from_json(wrong, source=Path("cache.json"))


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", CONFIG)
    (model / "config.json").write_text("{")
    with pytest.raises(DpoCacheError, match=r"config\.json is not valid JSON"):
        identify(model)
    (model / "config.json").unlink()
    with pytest.raises(DpoCacheError, match=r"config\.json is missing"):
        identify(model)

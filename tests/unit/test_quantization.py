"""Quantized weights: what is quantized, that both stages compute with it alike, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.completion_head import CompletionHead
from dpo_cache.pipeline.scoring.flops import ModelCost
from dpo_cache.pipeline.scoring.layouts import padded_batch, prefix_shared_batch
from dpo_cache.pipeline.scoring.model_loading import load_causal_lm
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.pipeline.scoring.quantization import quantized_layers
from quantized_model import plainly_quantized
from tiny_model_factory import plain_side_logps, tiny_model, token_pairs
from torch import nn


def saved(folder: Path, name: str = "llama", **changes: Any) -> Path:
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str | None = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    return load_causal_lm(folder, dtype=dtype, attention="sdpa", device="cpu", quantization=quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "num_quantized"), [("llama", 14), ("qwen2", 14), ("mixtral", 8)])
def test_every_linear_layer_but_the_head_is_quantized_and_the_rest_is_as_it_was(
    tmp_path: Path, name: str, num_quantized: int, dtype: torch.dtype
) -> None:
    full, model = load(saved(tmp_path, name), None, dtype), load(tmp_path, dtype=dtype)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == len(quantized_layers(model)) == num_quantized
    assert linears - quantized == {"lm_head"}
    before = dict(full.named_parameters())
    for path, parameter in model.named_parameters():
        if path.removesuffix(".weight") not in quantized:
            assert torch.equal(parameter, before[path]), path
            assert parameter.dtype == dtype
    states = [layer.weight.quant_state for layer in quantized_layers(model)]
    assert {(state.quant_type, state.nested, state.blocksize) for state in states} == {("nf4", True, 64)}
    assert {layer.compute_dtype for layer in quantized_layers(model)} == {dtype}
    assert not any("absmax" in path or "quant" in path for path in model.state_dict())


def test_a_pair_has_the_value_of_the_quantized_models_own_logits_and_not_that_of_the_full_one(tmp_path: Path) -> None:
    pairs = token_pairs()
    scorer = PairScorer(load(saved(tmp_path))).eval()
    assert all(type(layer) is Linear4bit for layer in quantized_layers(scorer))
    assert isinstance(scorer.model.lm_head, CompletionHead)
    plain = plainly_quantized(tmp_path)
    with torch.no_grad():
        expected = [float(plain_side_logps(plain, pair, "chosen").double().sum()) for pair in pairs]
    full = PairScorer(load(tmp_path, None)).eval()
    for make in (padded_batch, prefix_shared_batch):
        with torch.inference_mode():
            found, other = scorer(make(pairs)).chosen_logps_B, full(make(pairs)).chosen_logps_B
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
        assert (found - other).abs().max() > 0.1


def test_passes_without_gradients_leave_the_values_and_the_gradients_of_training_alone(tmp_path: Path) -> None:
    def values(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = model(input_ids=torch.tensor([[5, 9, 3, 17, 60]])).logits
        model.zero_grad()
        torch.autograd.backward(found.log_softmax(-1)[0, :, 7].sum())
        return found.detach(), model.model.embed_tokens.weight.grad.clone()

    expected = values(plainly_quantized(saved(tmp_path)))
    model = load(tmp_path).eval()
    with torch.no_grad():
        without_gradients = model(input_ids=torch.tensor([[5, 9, 3, 17, 60]])).logits
    found = values(model.train())
    assert torch.equal(without_gradients, found[0])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert expected[1].abs().max() > 0.1


def test_a_token_costs_as_much_as_with_full_weights(tmp_path: Path) -> None:
    assert ModelCost.of_model(load(saved(tmp_path))) == ModelCost.of_model(load(tmp_path, None))


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    plainly_quantized(saved(tmp_path / "full")).save_pretrained(tmp_path / "quantized")
    assert "quantization_config" in json.loads((tmp_path / "quantized/config.json").read_text())
    with pytest.raises(DpoCacheError, match="is quantized already"):
        load(tmp_path / "quantized")


def test_another_quantization_and_a_missing_library_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    with pytest.raises(DpoCacheError, match="quantization to int3 is not known"):
        load(tmp_path, "int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DpoCacheError, match=r"need bitsandbytes(.|\n)*pip install 'dpo-cache\[qlora\]'"):
        load(tmp_path)

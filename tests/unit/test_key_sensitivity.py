"""Everything that can change a log-probability makes another key or another identity, and nothing else does.

One change at a time, on random pairs and on a model's files. What may be reused is a (key, identity) pair, so a
change of either is a miss.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_factory import make_cache, make_rows, mixture_rows
from dpo_cache.pipeline.cache.example_key import example_key
from dpo_cache.pipeline.cache.reference_identity import ReferenceIdentity, identify_reference
from dpo_cache.pipeline.data.token_pair import TokenPair
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.torch import load_file, save_file

IDS = npst.arrays(np.int32, st.integers(1, 8), elements=st.integers(0, 2**31 - 1))


@st.composite
def pairs(draw: st.DrawFn) -> TokenPair:
    """Any pair, its mask spelled out, with a scored and an unscored token to flip."""
    prompt, chosen, rejected = draw(IDS), draw(IDS), draw(IDS)
    mask = draw(npst.arrays(np.bool_, len(prompt) + len(chosen) + len(rejected)))
    return TokenPair(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, scored_mask=mask)


@given(pairs(), st.data())
def test_every_change_of_what_was_scored_makes_another_key(pair: TokenPair, data: st.DataObject) -> None:
    key = example_key(pair)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = getattr(pair, name)
        place, bit = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, 30))
        changed = ids.copy()
        changed[place] ^= np.int32(1 << bit)
        assert example_key(replace(pair, **{name: changed})) != key
    assert pair.scored_mask is not None
    for place in range(len(pair.scored_mask)):
        mask = pair.scored_mask.copy()
        mask[place] ^= True
        assert example_key(replace(pair, scored_mask=mask)) != key
    whole = np.concatenate([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
    start, end = len(pair.prompt_ids), len(pair.prompt_ids) + len(pair.chosen_ids)
    for cut in {(start + 1, end), (start - 1, end), (start, end + 1), (start, end - 1)}:
        if 0 <= cut[0] <= cut[1] <= len(whole):  # the same ids, another of them an answer's first
            prompt, chosen, rejected = np.split(whole, cut)
            moved = replace(pair, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
            assert example_key(moved) != key
    exchanged = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
    assert np.array_equal(pair.chosen_ids, pair.rejected_ids) or example_key(exchanged) != key


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "final_logit_softcapping": 30.0,
    "layer_types": ["full_attention", "sliding_attention"],
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
TENSORS = {
    "embed.weight": torch.randn(5, 4),
    "layers.0.weight": torch.randn(4, 4).bfloat16(),
    "layers.0.bias": torch.randn(4).half(),
    "norm.weight": torch.ones(4),
    "lm_head.weight": torch.randn(5, 4),
    "rotary.steps": torch.arange(3),
}


class Reference:
    """A model folder, an adapter folder and the numerics of scoring, to be changed in one way each."""

    def __init__(self, folder: Path) -> None:
        self.model, self.adapter = folder / "model", folder / "adapter"
        self.model.mkdir(parents=True)
        self.adapter.mkdir()
        self.config(lambda config: None)
        save_file(TENSORS, self.model / "model.safetensors")
        save_file({"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}, self._lora)
        self._lora_config.write_text(
            json.dumps({"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "peft_version": "1"})
        )
        self.numerics: dict[str, Any] = {
            "weight_dtype": "float32",
            "compute_dtype": "float32",
            "attention": "sdpa",
            "scoring_version": 1,
        }

    @property
    def _lora(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def _lora_config(self) -> Path:
        return self.adapter / "adapter_config.json"

    def identity(self) -> ReferenceIdentity:
        return identify_reference(self.model, adapter_folder=self.adapter, **self.numerics)

    def config(self, change: Callable[[dict[str, Any]], object]) -> None:
        changed = json.loads(json.dumps(CONFIG))
        change(changed)
        (self.model / "config.json").write_text(json.dumps(changed))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        changed = {name: tensor.clone() for name, tensor in TENSORS.items()}
        change(changed)
        save_file(changed, self.model / "model.safetensors")

    def flip_adapter_bit(self) -> None:
        tensors = load_file(self._lora)
        tensors["lora_B"].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, self._lora)

    def adapter_config(self, **changes: Any) -> None:
        self._lora_config.write_text(json.dumps(json.loads(self._lora_config.read_text()) | changes))

    def reshard(self) -> None:
        names = sorted(TENSORS)
        (self.model / "model.safetensors").unlink()
        for number, part in enumerate((names[::2], names[1::2])):
            save_file({name: TENSORS[name] for name in part}, self.model / f"part-{number}.safetensors")
        index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    def move(self) -> None:
        self.model = self.model.rename(self.model.with_name("renamed"))

    def touch(self) -> None:
        for path in self.model.iterdir():
            os.utime(path, (1, 1))

    def copy(self) -> None:
        self.model = Path(shutil.copytree(self.model, self.model.with_name("copied")))


def one_bit(name: str) -> Callable[[Reference], None]:
    """The lowest bit of the last value of a tensor, changed."""

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[-tensors[name].element_size()] ^= 1

    return lambda reference: reference.tensors(flip)


COUNTS: dict[str, Callable[[Reference], object]] = {
    **{f"a bit of {name}": one_bit(name) for name in TENSORS},
    "two tensors exchanged": lambda r: r.tensors(
        lambda t: t.update({"embed.weight": t["lm_head.weight"], "lm_head.weight": t["embed.weight"]})
    ),
    "a tensor less": lambda r: r.tensors(lambda t: t.pop("lm_head.weight")),
    "a tensor's dtype": lambda r: r.tensors(lambda t: t.update({"norm.weight": t["norm.weight"].view(torch.int32)})),
    "a tensor's shape": lambda r: r.tensors(lambda t: t.update({"embed.weight": t["embed.weight"].reshape(4, 5)})),
    "the weights' dtype": lambda r: r.numerics.update(weight_dtype="bfloat16"),
    "the dtype of products": lambda r: r.numerics.update(compute_dtype="bfloat16"),
    "weights that are quantized": lambda r: r.numerics.update(quantization="nf4"),
    "the attention kernel": lambda r: r.numerics.update(attention="eager"),
    "the scoring code": lambda r: r.numerics.update(scoring_version=2),
    "a bit of the adapter": Reference.flip_adapter_bit,
    "the adapter's alpha": lambda r: r.adapter_config(lora_alpha=8),
    "the adapter's targets": lambda r: r.adapter_config(target_modules=["q", "k"]),
    "an architecture": lambda r: r.config(lambda c: c.update(architectures=["MistralForCausalLM"])),
    "a norm's epsilon": lambda r: r.config(lambda c: c.update(rms_norm_eps=1e-5)),
    "a rope parameter": lambda r: r.config(lambda c: c["rope_parameters"].update(factor=4.0)),
    "a sliding window": lambda r: r.config(lambda c: c.update(sliding_window=128)),
    "tied embeddings": lambda r: r.config(lambda c: c.update(tie_word_embeddings=True)),
    "soft-capping gone": lambda r: r.config(lambda c: c.pop("final_logit_softcapping")),
    "the order of layer types": lambda r: r.config(lambda c: c["layer_types"].reverse()),
    "a key nobody knows": lambda r: r.config(lambda c: c.update(brand_new=True)),
    "an integer in the place of a float": lambda r: r.config(lambda c: c.update(final_logit_softcapping=31)),
}
DOES_NOT_COUNT: dict[str, Callable[[Reference], object]] = {
    "the same tensors in other files": Reference.reshard,
    "another folder name": Reference.move,
    "other file times": Reference.touch,
    "a copy": Reference.copy,
    "a file that is no weight": lambda r: (r.model / "README.md").write_text("hello"),
    "the generation settings": lambda r: (r.model / "generation_config.json").write_text('{"temperature": 2}'),
    "the dtype that the config states": lambda r: r.config(lambda c: c.update(torch_dtype="float32")),
    "use_cache": lambda r: r.config(lambda c: c.update(use_cache=False)),
    "dropout": lambda r: r.config(lambda c: c.update(attention_dropout=0.1)),
    "who wrote the config": lambda r: r.config(lambda c: c.update(transformers_version="9", _name_or_path="x")),
    "the order of the config": lambda r: r.config(lambda c: c.update({"model_type": c.pop("model_type")})),
    "where the adapter came from": lambda r: r.adapter_config(base_model_name_or_path="elsewhere", peft_version="2"),
    "the adapter's dropout": lambda r: r.adapter_config(lora_dropout=0.1),
    "the order of the adapter's targets": lambda r: r.adapter_config(target_modules=["v", "q"]),
}


@pytest.mark.parametrize("change", COUNTS)
def test_every_change_of_what_scores_makes_another_identity(tmp_path: Path, change: str) -> None:
    reference = Reference(tmp_path)
    before = reference.identity().digest
    COUNTS[change](reference)
    assert reference.identity().digest != before


@pytest.mark.parametrize("change", DOES_NOT_COUNT)
def test_no_other_change_does(tmp_path: Path, change: str) -> None:
    reference = Reference(tmp_path)
    before = reference.identity().digest
    DOES_NOT_COUNT[change](reference)
    assert reference.identity().digest == before


def test_neither_the_order_of_the_data_nor_how_it_is_cut_into_batches_shards_and_sources_changes_what_is_reused(
    tmp_path: Path,
) -> None:
    rows = make_rows(20)
    found = []
    for number, (order, shard_rows) in enumerate(((np.arange(20), 20), (np.random.RandomState(0).permutation(20), 3))):
        cache = make_cache(tmp_path / str(number))
        for start in range(0, 20, shard_rows):
            cache.shards.write([rows[place] for place in order[start : start + shard_rows]])
        index = cache.shards.key_index()
        asked = mixture_rows([rows[place] for place in order], source=number)
        mixture = cache.write_mixture(
            "train", asked, key_index=index, tokenization={}, sources=[{}] * (number + 1), dropped={}
        )
        found.append((cache.reference_id, mixture.digest, index.keys.tolist()))
    assert found[0] == found[1]

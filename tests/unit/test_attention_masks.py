"""The tree mask, written out couple by couple, against what each kernel is given."""

from __future__ import annotations

import pytest
import torch
from dpo_cache.pipeline.scoring.attention_masks import (
    FULL,
    SLIDING,
    LayerWindows,
    additive_mask,
    attention_mask,
    block_mask,
    dense_mask,
)
from dpo_cache.pipeline.scoring.layouts import scoring_batch
from dpo_cache.pipeline.scoring.scoring_batch import Layout
from tiny_model_factory import CONFIGS, token_pairs
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig

ALL_FULL = LayerWindows(layer_types=frozenset([FULL]), window=None)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("layout", Layout)
def test_a_token_sees_its_prompt_and_its_own_segment_within_the_window(layout: Layout, window: int | None) -> None:
    batch = scoring_batch(token_pairs(), layout)
    mask = dense_mask(batch, window)
    rows, width = batch.input_ids_RT.shape
    segment, trunk, position = batch.segment_RT.tolist(), batch.trunk_RT.tolist(), batch.position_ids_RT.tolist()
    for row in range(rows):
        for query in range(width):
            for key in range(width):
                related = segment[row][key] in (segment[row][query], trunk[row][query])
                near = window is None or position[row][query] - position[row][key] < window
                assert bool(mask[row, 0, query, key]) == (key <= query and related and near)


def test_every_token_sees_itself_padding_too() -> None:
    """A row of the softmax without any key would be NaN, and NaN times zero is NaN."""
    mask = dense_mask(scoring_batch(token_pairs(), Layout.PREFIX_SHARED), 1)
    assert mask.diagonal(dim1=2, dim2=3).all()


@pytest.mark.parametrize("window", [None, 4])
def test_the_block_mask_lets_through_what_the_dense_mask_does(window: int | None) -> None:
    batch = scoring_batch(token_pairs(), Layout.PACKED)
    sees = block_mask(batch, window).mask_mod
    width = batch.input_ids_RT.shape[1]
    query, key = torch.meshgrid(torch.arange(width), torch.arange(width), indexing="ij")
    assert torch.equal(sees(torch.tensor(0), torch.tensor(0), query, key), dense_mask(batch, window)[0, 0])


def test_each_kernel_gets_its_own_form() -> None:
    batch = scoring_batch(token_pairs(), Layout.PREFIX_SHARED)

    def mask(kernel: str, windows: LayerWindows = ALL_FULL) -> object:
        return attention_mask(batch, windows=windows, kernel=kernel, dtype=torch.bfloat16)

    bool_mask, float_mask = mask("sdpa"), mask("eager")
    assert isinstance(bool_mask, torch.Tensor)
    assert isinstance(float_mask, torch.Tensor)
    assert bool_mask.dtype is torch.bool
    assert float_mask.dtype is torch.bfloat16
    assert torch.equal(float_mask == 0, bool_mask)
    assert float_mask.min() == torch.finfo(torch.bfloat16).min
    assert isinstance(mask("flex_attention"), BlockMask)
    mixed = mask("sdpa", LayerWindows(layer_types=frozenset([FULL, SLIDING]), window=4))
    assert isinstance(mixed, dict)
    assert torch.equal(mixed[FULL], bool_mask)
    assert torch.equal(mixed[SLIDING], dense_mask(batch, 4))
    with pytest.raises(AssertionError):
        mask("flash_attention_2")


def test_padded_rows_need_no_mask() -> None:
    batch = scoring_batch(token_pairs(), Layout.PADDED)
    assert attention_mask(batch, windows=ALL_FULL, kernel="flash_attention_2", dtype=torch.float32) is None


def test_an_additive_mask_is_finite() -> None:
    visible = dense_mask(scoring_batch(token_pairs(), Layout.PACKED))
    assert additive_mask(visible, torch.float16).isfinite().all()


@pytest.mark.parametrize(
    ("name", "layer_types", "window"),
    [
        ("llama", {FULL}, None),
        ("qwen2", {FULL}, None),
        ("qwen3-sliding", {FULL, SLIDING}, 4),
        ("mistral", {SLIDING}, 4),
        ("gemma2", {FULL, SLIDING}, 4),
        ("gemma3", {FULL, SLIDING}, 4),
        ("mixtral", {FULL}, None),
    ],
)
def test_layer_windows_are_read_off_the_config(name: str, layer_types: set[str], window: int | None) -> None:
    windows = LayerWindows.of_config(AutoConfig.for_model(**CONFIGS[name]))
    assert windows == LayerWindows(layer_types=frozenset(layer_types), window=window)

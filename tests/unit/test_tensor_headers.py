"""What safetensors files say of their tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.tensor_headers import check_headers, checkpoint_dtype, read_headers
from safetensors.torch import load_file, save_file
from training_factory import tiny_policy


def test_a_file_that_lacks_a_tensor_or_has_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    tiny_policy().save_pretrained(tmp_path)
    expected = read_headers(tmp_path)
    check_headers(tmp_path, expected)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DpoCacheError, match="2 tensors differ") as caught:
        check_headers(tmp_path, expected)
    assert "lm_head.weight: None instead of TensorHeader(dtype='F32', shape=(64, 16))" in str(caught.value)
    assert "model.norm.weight: TensorHeader(dtype='F16'" in str(caught.value)


def test_a_model_is_written_in_the_dtype_of_most_numbers_of_its_base_up_to_float32(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(8)}, tmp_path / "x.safetensors")
    assert checkpoint_dtype(tmp_path) == torch.bfloat16
    save_file({"a": torch.zeros(9, dtype=torch.float64)}, tmp_path / "x.safetensors")
    assert checkpoint_dtype(tmp_path) == torch.float32, "the optimizer has no weights more precise than that"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DpoCacheError, match="holds no safetensors file"):
        checkpoint_dtype(tmp_path / "empty")


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")])
def test_a_checkpoint_of_8_bit_numbers_is_refused(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save_file({"a": torch.zeros(9, dtype=dtype), "b": torch.zeros(8)}, tmp_path / "x.safetensors")
    with pytest.raises(DpoCacheError, match=f"most weights of {tmp_path} are {name}") as refused:
        checkpoint_dtype(tmp_path)
    assert refused.value.expected == "a checkpoint in BF16, F16 or F32"

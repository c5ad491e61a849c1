"""The attention kernels that a model may be loaded with, under their names in transformers. Needs no PyTorch."""

from __future__ import annotations

ATTENTION_KERNELS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
GPU_KERNELS = ("flex_attention", "flash_attention_2")
"""On a CPU flex_attention has no backward pass, and its forward pass has to be compiled."""

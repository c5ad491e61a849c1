"""What ``benchmarks/gpu.py`` scores and trains, and each way in which it does so."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from dpo_cache.pipeline.scoring.scoring_batch import Layout


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a section of results is about.

    Attributes:
        shape: A key of :data:`~gpu_workload.SHAPES`.
        trains: Whether there is a backward pass and an update.
        lora: An adapter is trained, not the model.
    """

    shape: str
    trains: bool
    lora: bool

    @classmethod
    def parse(cls, what: str) -> Subject:
        """Such as ``train-lora-8b``."""
        kind, _, shape = what.rpartition("-")
        return cls(shape=shape, trains=kind != "score", lora=kind == "train-lora")

    def __str__(self) -> str:
        if not self.trains:
            return f"{self.shape.upper()} scored"
        return f"{self.shape.upper()} trained {'with LoRA' if self.lora else 'in full'}"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to score or to train it.

    Attributes:
        name: In the table.
        subject: What is scored or trained.
        layout: How pairs lie in rows.
        attention: The kernel.
        zero_stage: DeepSpeed's.
        head_chunk_tokens: Scored tokens whose logits are held at once; None as usual.
        liger: With Liger's layers.
        recomputes: Activations of all layers are computed again in the backward pass instead of being kept.
    """

    name: str
    subject: Subject
    layout: Layout
    attention: str
    zero_stage: int
    head_chunk_tokens: int | None = None
    liger: bool = False
    recomputes: bool = False


def ways_of(subject: Subject, options: argparse.Namespace) -> Iterator[Way]:
    """All that makes it quick, then with one thing changed at a time."""
    on_gpu = torch.cuda.is_available()
    layout, attention = (Layout.PACKED, "flex_attention") if on_gpu else (Layout.PREFIX_SHARED, "sdpa")
    liger = subject.trains and on_gpu
    whole = Way(
        name=f"{layout}, {attention}" + (", Liger" if liger else ""),
        subject=subject,
        layout=layout,
        attention=attention,
        zero_stage=options.zero_stage,
        liger=liger,
    )
    yield whole
    if layout is Layout.PACKED:
        shared = replace(whole, layout=Layout.PREFIX_SHARED, attention="sdpa")
        yield replace(shared, name="… without packing: prefix-shared, sdpa")
    yield replace(whole, name="… without a shared prefix: padded, sdpa", layout=Layout.PADDED, attention="sdpa")
    yield replace(whole, name="… with all logits at once", head_chunk_tokens=10**9)
    if liger:
        yield replace(whole, name="… without Liger", liger=False)
    if subject.trains:
        yield replace(whole, name="… with all layers recomputed", recomputes=True)
        if whole.zero_stage != 3:
            yield replace(whole, name="… at ZeRO stage 3", zero_stage=3)

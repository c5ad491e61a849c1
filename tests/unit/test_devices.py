"""Which GPU a process takes, and what it says when there is none, or no memory left."""

from __future__ import annotations

import os

import deepspeed
import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes import process_group
from dpo_cache.stages.processes.devices import device_of_rank, gpu_explained
from dpo_cache.stages.processes.ranks import Ranks


def gpus(monkeypatch: pytest.MonkeyPatch, *, count: int, visible: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, count=8, visible=None)
    assert [device_of_rank(rank).index for rank in (0, 7)] == [0, 7]


def test_a_process_that_is_shown_one_gpu_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun --gpus-per-task=1``: the fourth process of a machine sees GPU 3 alone, as number 0."""
    gpus(monkeypatch, count=1, visible="3")
    assert device_of_rank(3) == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_torchs_allocator_are_left_to_who_made_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads the second name only where the first is not set."""
    gpus(monkeypatch, count=1, visible=None)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for one in names:
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    device_of_rank(0)
    assert {one: os.environ[one] for one in names if one in os.environ} == {name: "max_split_size_mb:128"}


@pytest.mark.parametrize(("device", "number"), [("cuda:0", "0"), ("cpu", "3")])
def test_deepspeed_is_told_the_gpu_that_the_process_took(device: str, number: str) -> None:
    ranks = Ranks(rank=3, num_ranks=4, rank_of_node=3, ranks_per_node=4)
    assert process_group.deepspeed_device(ranks, torch.device(device)) == {"LOCAL_RANK": number}


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_more_processes_than_gpus_are_refused(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, count=1 if visible is None else 2, visible=visible)
    with pytest.raises(DpoCacheError, match="process 4 of this machine has no GPU"):
        device_of_rank(3)


def test_a_full_gpu_is_explained() -> None:
    explained = gpu_explained("--gradient-checkpointing")
    with pytest.raises(DpoCacheError, match="the GPU's memory ran out: CUDA out of memory") as raised, explained:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity")
    assert raised.value.next_step == "--gradient-checkpointing"


def test_a_kernel_that_cannot_be_compiled_is_explained() -> None:
    def compile_for_a_gpu_of_graphics(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    attend = torch.compile(lambda x: x + 1, backend=compile_for_a_gpu_of_graphics)
    explained = gpu_explained("--gradient-checkpointing")
    with (
        pytest.raises(DpoCacheError, match="cannot be compiled for this GPU: out of resource") as raised,
        explained,
    ):
        attend(torch.zeros(1))
    assert "--attn-implementation sdpa" in str(raised.value)


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a bug"), gpu_explained("--gradient-checkpointing"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("device", "num_ranks", "parts"),
    [("cpu", 2, True), ("cuda:0", 1, True), ("cuda:0", 2, False)],
)
def test_a_rank_of_gpus_that_fails_alone_does_not_wait_for_the_others(
    device: str, num_ranks: int, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking NCCL's group apart waits for all that is under way, which the others wait for in turn."""
    parted: list[bool] = []
    monkeypatch.setattr(process_group, "device_of_rank", lambda _: torch.device(device))
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(process_group, "open_host_group", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: parted.append(True))
    ranks = Ranks(rank=0, num_ranks=num_ranks, rank_of_node=0, ranks_per_node=num_ranks)
    with pytest.raises(DpoCacheError, match="alone"), process_group.process_group(ranks):
        raise DpoCacheError("alone")
    assert bool(parted) is parts
    with process_group.process_group(ranks):
        pass
    assert len(parted) == 1 + parts

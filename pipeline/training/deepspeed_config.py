"""Our settings in DeepSpeed's words: every number written out, nothing left to "auto" or to a default that moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...errors import DpoCacheError
from .host_memory import low_mmap_threshold

Json = dict[str, Any]

TRAINED_DTYPES = ("float32", "bfloat16")

MIN_BUCKET_ELEMENTS = 1_000_000
"""Below this, collectives of small models are all latency; DeepSpeed's own 5e8 would cost gigabytes of buffers."""
MIN_GPU_BUCKET_ELEMENTS = 100_000_000
"""Stages 1 and 2 reduce the gradients of a whole model bucket by bucket: a few large ones on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What the engine's configuration depends on.

    Attributes:
        zero_stage: 0 (every rank holds everything) to 3 (weights, gradients and optimizer state are partitioned).
        dtype: ``float32``, or ``bfloat16`` with float32 master weights.
        max_grad_norm: Gradients are scaled down to this norm; 0 for no clipping.
        num_ranks: Processes that train together.
        hidden_size: Width of the model, from which the sizes of buffers follow.
        on_gpu: Overlap communication with computing.
        offload_optimizer: Keep optimizer state and master weights in host memory.
        offload_parameters: Keep partitioned weights in host memory, at stage 3.
        hierarchical_partition_size: Ranks that hold a whole copy of the weights between them (ZeRO++'s hpZ), 1 for
            none. A second copy of the weights within a node for less traffic between nodes, at stage 3.
        load_universal: The state to resume from was saved by another number of ranks and has been converted.
    """

    zero_stage: int
    dtype: str
    max_grad_norm: float
    num_ranks: int
    hidden_size: int
    on_gpu: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False
    hierarchical_partition_size: int = 1
    load_universal: bool = False

    def __post_init__(self) -> None:
        assert self.zero_stage in (0, 1, 2, 3)
        assert self.dtype in TRAINED_DTYPES
        assert self.max_grad_norm >= 0
        refuse_idle_partitions(
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            hierarchical_partition_size=self.hierarchical_partition_size,
        )
        if self.num_ranks % self.hierarchical_partition_size:
            raise DpoCacheError(
                f"--zero-hpz-partition-size is {self.hierarchical_partition_size} on {self.num_ranks} ranks",
                expected=f"a number that divides {self.num_ranks}",
            )


def refuse_idle_partitions(
    *, zero_stage: int, offload_optimizer: bool, offload_parameters: bool, hierarchical_partition_size: int
) -> None:
    """Refuse settings that would do nothing at this stage.

    Raises:
        DpoCacheError: Naming the option and the stages at which it means something.
    """
    if offload_optimizer and zero_stage == 0:
        raise DpoCacheError("--offload-optimizer has no effect at --zero-stage 0", expected="stage 1, 2 or 3")
    if offload_parameters and zero_stage != 3:
        raise DpoCacheError(f"--offload-parameters has no effect at --zero-stage {zero_stage}", expected="stage 3")
    if hierarchical_partition_size != 1 and zero_stage != 3:
        raise DpoCacheError(f"--zero-hpz-partition-size has no effect at --zero-stage {zero_stage}", expected="stage 3")


def deepspeed_config(settings: EngineSettings) -> Json:
    """The dictionary that ``deepspeed.initialize`` takes.

    The three batch numbers are there because DeepSpeed insists on them. They mean nothing here: global batches are
    dealt by token count, the number of micro-steps varies, and losses come to DeepSpeed already divided.
    """
    config: Json = {
        "train_batch_size": settings.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(settings.max_grad_norm),
        "prescale_gradients": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(settings),
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host too
        "checkpoint": {"load_universal": settings.load_universal},
    }
    if settings.dtype == "bfloat16":
        config["bf16"] = {
            "enabled": True,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
        }
        # DeepSpeed accumulates in the weights' dtype unless told otherwise; at stage 0 it knows no other way.
        config["data_types"] = {"grad_accum_dtype": "fp32" if settings.zero_stage else "bf16"}
    return config


@contextmanager
def partitioned_loading(config: Json) -> Iterator[None]:
    """While this is open, transformers partitions a model's weights over the ranks as it reads them, at stage 3.

    Host memory per rank then stays near the largest file of the checkpoint instead of the whole model.
    """
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(verbose=False)  # adopts the process group there is; without it, one rank is assumed
    registered = HfDeepSpeedConfig(config)  # transformers itself only keeps a weak reference
    try:
        with low_mmap_threshold():
            yield
    finally:
        unset_hf_deepspeed_config()
        del registered


def _zero(settings: EngineSettings) -> Json:
    reduces_whole = settings.on_gpu and settings.zero_stage in (1, 2)
    bucket = max(settings.hidden_size**2, MIN_GPU_BUCKET_ELEMENTS if reduces_whole else MIN_BUCKET_ELEMENTS)
    zero: Json = {
        "stage": settings.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": settings.on_gpu and settings.zero_stage == 3,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.zero_stage == 3:
        zero |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": bucket * 9 // 10,
            "stage3_param_persistence_threshold": 10 * settings.hidden_size,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": settings.hierarchical_partition_size,
        }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": settings.on_gpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": settings.on_gpu}
    return zero

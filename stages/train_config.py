"""The settings of ``dpo-train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DpoCacheError
from ..pipeline.training.deepspeed_config import refuse_idle_partitions
from ..pipeline.training.objective import F_DIVERGENCES, LOSS_TRAITS, Objective, resolve_loss
from .location import Location
from .setting import check_settings, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train from which cache, and how."""

    cache: Location = setting(
        help="Folder of the cache that `dpo-cache build` wrote, or an address: hf://datasets/ORG/NAME, s3://…, https://….",
        metavar="DIR_OR_ADDRESS",
    )
    output: Path = setting(help="Folder of this run: config, metrics, checkpoints, the trained model.")
    mixture: str = setting("train", help="Pairs to train on, by the name they have in the cache.")
    eval_mixture: str | None = setting(None, help="Held-out pairs, by the name they have in the cache.")
    eval_steps: int | None = setting(
        None, help="Evaluate every N steps [default: before the first and after the last].", minimum=1
    )
    keep_best: str | None = setting(
        None, help="Keep the best model by the held-out reward in OUTPUT/best too.", choices=("accuracy", "margin")
    )

    model: str | None = setting(
        None, help="Where the policy starts [default: the cache's reference].", metavar="PATH_OR_ID"
    )
    model_revision: str | None = setting(None, help="Revision of a model on the Hub.")
    allow_other_policy: bool = setting(False, help="Let the policy start elsewhere than at the reference.")
    allow_numerics_mismatch: bool = setting(
        False, help="Train in another dtype or with another attention kernel than the cache was scored in."
    )
    trust_remote_code: bool = setting(False, help="Run Python code that comes with the model.")
    dtype: str | None = setting(
        None, help="Precision of the forward pass [default: the cache's].", choices=("float32", "bfloat16")
    )
    attn_implementation: str | None = setting(
        None,
        help="Attention kernel [default: the cache's].",
        choices=("sdpa", "eager", "flex_attention", "flash_attention_2"),
    )
    gradient_checkpointing: bool = setting(False, help="Recompute activations in the backward pass.")

    use_lora: bool = setting(False, help="Train a LoRA adapter; the policy's own weights stay as they are.")
    lora_rank: int | None = setting(None, help="Inner size of the adapter's matrices [default: 64].", minimum=1)
    lora_alpha: float | None = setting(None, help="The adapter is scaled by alpha over rank [default: 16].", above=0)
    lora_target_modules: tuple[str, ...] = setting(
        (),
        help="Layers that get an adapter, by name; repeatable [default: all linear ones but the head].",
        metavar="NAME",
    )
    use_qlora: bool = setting(
        False, help="The same on weights quantized to nf4; for a cache built with --quantization nf4."
    )
    merge: bool = setting(False, help="Add the adapter to the weights and save a whole model at the end.")
    load_balancing_loss: bool = setting(False, help="Keep a mixture of experts balanced: adds its auxiliary loss.")
    load_balancing_weight: float | None = setting(None, help="Weight of the auxiliary loss [default: 0.001].", above=0)
    use_liger_kernel: bool = setting(False, help="Liger's kernels for rotary embedding, norms and MLPs, on a GPU.")

    loss: str = setting(
        "dpo_norm",
        help=f"The preference loss: {', '.join(LOSS_TRAITS)}; or a weighted sum, each with a beta of its own where "
        "wanted: dpo_norm=1.0,ipo:0.1=0.2.",
        metavar="NAME[:BETA][=WEIGHT],...",
    )
    beta: float | None = setting(None, help="Strength of the pull to the reference [default: the loss's].", above=0)
    label_smoothing: float | None = setting(
        None, help="Share of labels taken to be flipped [default: 0; 0.001 for exo_pair].", minimum=0.0, maximum=0.5
    )
    gamma_beta_ratio: float | None = setting(None, help="SimPO's target margin over beta [default: 0.3].", minimum=0)
    f_divergence: str = setting("reverse_kl", help="What holds the policy near the reference.", choices=F_DIVERGENCES)
    f_alpha: float | None = setting(
        None, help="Alpha of the alpha divergence, between 0 and 1 [default: 0.5].", above=0
    )
    ld_alpha: float | None = setting(
        None,
        help="LD-DPO: weight of the tokens by which one answer is longer than the other [default: 1].",
        minimum=0.0,
        maximum=1.0,
    )
    nll_coef: float = setting(
        0.0, help="Weight of the chosen answer's negative log-likelihood per token, added to the loss.", minimum=0.0
    )

    global_batch_size: int | None = setting(
        None, help="Pairs in one update, on all GPUs together [default: 128].", minimum=1
    )
    per_device_train_batch_size: int | None = setting(
        None,
        help="Pairs a GPU in one micro-step; with accumulation and ranks it gives the global batch.",
        minimum=1,
    )
    gradient_accumulation_steps: int | None = setting(None, help="Micro-steps in one update.", minimum=1)
    tokens_per_microbatch: int | None = setting(
        None, help="Token budget of one forward and backward pass [default: the longest pair].", minimum=1
    )
    num_train_epochs: float = setting(1.0, help="Passes over the mixture.", above=0)
    max_steps: int | None = setting(None, help="Updates; overrides the epochs and sets the schedule.", minimum=1)
    stop_after_steps: int | None = setting(
        None, help="End after N updates with a checkpoint to go on from; the schedule stays the whole run's.", minimum=1
    )
    learning_rate: float = setting(5e-7, help="Peak learning rate.", minimum=0)
    lr_scheduler_type: str = setting(
        "linear", help="Shape of the learning rate after warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = setting(0.1, help="Share of the updates spent warming up.", minimum=0.0, maximum=1.0)
    weight_decay: float = setting(0.0, help="AdamW's decoupled weight decay.", minimum=0.0)
    adam_beta1: float = setting(0.9, help="AdamW's decay of the mean gradient.", minimum=0.0, below=1)
    adam_beta2: float = setting(0.999, help="AdamW's decay of the mean squared gradient.", minimum=0.0, below=1)
    adam_epsilon: float = setting(1e-8, help="AdamW's epsilon.", above=0)
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0 turns it off.", minimum=0.0)
    seed: int = setting(42, help="Decides the order of the pairs.", minimum=0)

    num_gpus: int | None = setting(
        None, help="Processes, one a GPU [default: all GPUs; one process on a CPU].", minimum=1
    )
    zero_stage: int = setting(3, help="What DeepSpeed partitions across the ranks.", minimum=0, maximum=3)
    offload_optimizer: bool = setting(False, help="Keep optimizer state and master weights in host memory.")
    offload_parameters: bool = setting(False, help="Keep partitioned weights in host memory, at stage 3.")
    zero_hpz_partition_size: int = setting(
        1,
        help="Ranks that hold a second copy of the weights between them, usually those of a node; 1 for none.",
        minimum=1,
    )

    checkpointing_steps: int | None = setting(
        500, help="Save a checkpoint every N updates; one is saved at the end too.", minimum=1
    )
    keep_last_n_checkpoints: int = setting(3, help="Older checkpoints are deleted; -1 keeps all.", minimum=-1)
    resume: str | None = setting(
        None,
        help="Go on from the newest complete checkpoint, or from the one named.",
        flag_value="latest",
        metavar="[latest|PATH]",
    )
    logging_steps: int = setting(1, help="Write a line of metrics every N updates.", minimum=1)
    with_tracking: bool = setting(False, help="Log to Weights & Biases too.")
    wandb_project: str = setting("dpo-cache", help="Weights & Biases project.")
    wandb_entity: str | None = setting(None, help="Weights & Biases entity.")
    wandb_tags: tuple[str, ...] = setting((), metavar="TAG", help="A tag of the run there; may be repeated.")
    with_tensorboard: bool = setting(False, help="Write TensorBoard's event files to OUTPUT/tensorboard too.")
    run_name: str | None = setting(None, help="Name of the run in trackers [default: the output folder's].")
    push_to_hub: bool = setting(False, help="Upload the trained model to the Hugging Face Hub at the end.")
    hub_model_id: str | None = setting(
        None, help="Repository on the Hub [default: the run's name, in your own namespace].", metavar="OWNER/NAME"
    )
    hub_revision: str | None = setting(None, help="Branch of that repository [default: the run's name].")
    hub_private: bool = setting(True, help="Make a private repository, where there is none yet.")
    dry_run: bool = setting(
        False,
        help="Run the longest global batch forward and backward, report memory and time; train nothing.",
    )
    plan: bool = setting(False, help="Resolve everything and print it; load no weights.")

    def __post_init__(self) -> None:
        check_settings(self)
        self.resolved_loss()  # says what is wrong with it before anything is opened
        per_device = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        if self.global_batch_size is not None and per_device != (None, None):
            raise DpoCacheError(
                "--global-batch-size is given together with --per-device-train-batch-size or "
                "--gradient-accumulation-steps",
                expected="one way to say how many pairs an update has",
            )
        if self.eval_steps is not None and self.eval_mixture is None:
            raise DpoCacheError("--eval-steps without --eval-mixture has nothing to evaluate on")
        if self.use_qlora and self.zero_stage == 3:
            raise DpoCacheError(
                "--use-qlora is given with --zero-stage 3 (its default), which cannot partition quantized weights: "
                "their blocks and scales belong together",
                expected="stage 0, 1 or 2: the quantized weights, a quarter of their size, stay whole on every GPU",
                next_step="add --zero-stage 2",
            )
        self._refuse_without(
            "use_lora" if not self.use_qlora else "use_qlora",
            lora_rank=self.lora_rank is not None,
            lora_alpha=self.lora_alpha is not None,
            lora_target_modules=bool(self.lora_target_modules),
            merge=self.merge,
        )
        self._refuse_without("load_balancing_loss", load_balancing_weight=self.load_balancing_weight is not None)
        self._refuse_without(
            "push_to_hub",
            hub_model_id=self.hub_model_id is not None,
            hub_revision=self.hub_revision is not None,
            no_hub_private=not self.hub_private,
        )
        self._refuse_without(
            "with_tracking",
            wandb_project=self.wandb_project != "dpo-cache",
            wandb_entity=self.wandb_entity is not None,
            wandb_tags=bool(self.wandb_tags),
        )
        self._refuse_without("model", model_revision=self.model_revision is not None)
        if self.keep_best is not None and self.eval_mixture is None:
            raise DpoCacheError("--keep-best without --eval-mixture has nothing to judge by")
        if self.keep_best is not None and not self.resolved_loss().uses_reference:
            raise DpoCacheError("--keep-best means nothing to a loss without a reference: it has no rewards")
        refuse_idle_partitions(
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            hierarchical_partition_size=self.zero_hpz_partition_size,
        )
        if self.plan and self.dry_run:
            raise DpoCacheError("--plan and --dry-run are given together", expected="one of them")
        if self.keep_last_n_checkpoints == 0:
            raise DpoCacheError("--keep-last-n-checkpoints is 0", expected="1 or more, or -1 to keep all")

    def _refuse_without(self, needed: str, **given: bool) -> None:
        """Refuse options that are given and would be ignored."""
        if getattr(self, needed):
            return
        ignored = [_flag(name) for name, is_given in given.items() if is_given]
        if ignored:
            raise DpoCacheError(
                f"{ignored[0]} has no effect without {_flag(needed)}",
                next_step=f"add {_flag(needed)}, or leave {ignored[0]} out",
            )

    @property
    def resolved_run_name(self) -> str:
        """The run's name in trackers and on the Hub."""
        return self.run_name or self.output.resolve().name

    @property
    def quantization(self) -> str | None:
        """What the policy's own weights are quantized to; None where they are left as they are."""
        return "nf4" if self.use_qlora else None

    @property
    def saves_adapter(self) -> bool:
        """Whether what comes out is an adapter, and not a whole model."""
        return self.resolved_lora() is not None and not self.merge

    def resolved_lora(self) -> dict[str, Any] | None:
        """The adapter's numbers; None where the policy itself is trained."""
        if not (self.use_lora or self.use_qlora):
            return None
        return {
            "rank": self.lora_rank or 64,
            "alpha": self.lora_alpha or 16.0,
            "target_modules": list(self.lora_target_modules or ("all-linear",)),
            **({"quantization": self.quantization} if self.quantization else {}),
        }

    def resolved_loss(self) -> Objective:
        """What is minimised, with all its numbers."""
        return resolve_loss(
            self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma_beta_ratio=self.gamma_beta_ratio,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            ld_alpha=self.ld_alpha,
            nll_coef=self.nll_coef,
        )

    def resolved_load_balancing_weight(self) -> float | None:
        """Weight of a mixture of experts' auxiliary loss; None without."""
        return (self.load_balancing_weight or 0.001) if self.load_balancing_loss else None

    def resolved_global_batch_size(self, num_ranks: int) -> int:
        """Pairs in one update on ``num_ranks`` ranks."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        if self.per_device_train_batch_size is None and self.gradient_accumulation_steps is None:
            return 128
        return (self.per_device_train_batch_size or 1) * (self.gradient_accumulation_steps or 1) * num_ranks


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

"""The settings of ``dpo-train``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from ...pipeline.scoring.attention_names import ATTENTION_KERNELS
from ...pipeline.training.deepspeed_config import TRAINED_DTYPES, refuse_idle_partitions
from ...pipeline.training.learning_rate import SCHEDULES
from ...pipeline.training.objective import (
    DEFAULT_F_ALPHA,
    DEFAULT_GAMMA_BETA_RATIO,
    F_DIVERGENCES,
    LOSS_TRAITS,
    Objective,
    resolve_objective,
)
from ..addresses.location import Location
from ..setting import check_settings, refuse_ignored, setting

DEFAULT_GLOBAL_BATCH_SIZE = 128
DEFAULT_LORA_RANK = 64
DEFAULT_LORA_ALPHA = 16.0
DEFAULT_LOAD_BALANCING_WEIGHT = 0.001

for_data = partial(setting, group="Data and output")
for_policy = partial(setting, group="Policy")
for_adapter = partial(setting, group="Adapter (LoRA)")
for_loss = partial(setting, group="Loss")
for_optimization = partial(setting, group="Optimization")
for_memory = partial(setting, group="Memory and GPUs")
for_evaluation = partial(setting, group="Evaluation")
for_checkpoints = partial(setting, group="Checkpoints")
for_logging = partial(setting, group="Logging")
for_hub = partial(setting, group="Hugging Face Hub")
for_trial = partial(setting, group="Before a run")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train from which cache, and how."""

    cache: Location = for_data(
        help="Folder of the cache that `dpo-cache build` wrote, or its address: hf://datasets/ORG/NAME, s3://…, https://….",
        metavar="DIR_OR_ADDRESS",
    )
    mixture: str = for_data("train", help="Mixture of the cache to train on.")
    output: Path = for_data(help="Folder for this run: config, metrics, checkpoints and the trained model.")

    model: str | None = for_policy(
        None,
        help="Where the policy starts: a folder or a Hub id.",
        default_text="the cache's reference",
        metavar="PATH_OR_ID",
    )
    model_revision: str | None = for_policy(None, help="Revision of --model on the Hub.")
    allow_other_policy: bool = for_policy(False, help="Let the policy start from other weights than the reference.")
    allow_numerics_mismatch: bool = for_policy(
        False, help="Allow another dtype, attention kernel or quantization than the cache was scored with."
    )
    trust_remote_code: bool = for_policy(False, help="Run Python code that comes with the model.")
    dtype: str | None = for_policy(
        None,
        help="Precision of the forward pass.",
        default_text="the cache's",
        choices=TRAINED_DTYPES,
    )
    attn_implementation: str | None = for_policy(
        None,
        help="Attention kernel.",
        default_text="the cache's",
        choices=ATTENTION_KERNELS,
    )

    use_lora: bool = for_adapter(False, help="Train a LoRA adapter instead of the policy's own weights.")
    use_qlora: bool = for_adapter(
        False,
        help="Train a LoRA adapter on weights quantized to nf4. Needs a cache built with --quantization nf4.",
    )
    lora_rank: int | None = for_adapter(
        None, help="Rank of the adapter.", default_text=str(DEFAULT_LORA_RANK), minimum=1
    )
    lora_alpha: float | None = for_adapter(
        None, help="The adapter is scaled by alpha / rank.", default_text=f"{DEFAULT_LORA_ALPHA:g}", above=0
    )
    lora_target_modules: tuple[str, ...] = for_adapter(
        (),
        help="Name of a layer that gets an adapter. May be repeated.",
        default_text="all linear layers except the vocabulary head",
        metavar="NAME",
    )
    merge: bool = for_adapter(False, help="Merge the adapter into the weights at the end and save a whole model.")

    loss: str = for_loss(
        "dpo_norm",
        help=f"Preference loss: {', '.join(LOSS_TRAITS)}. Or a weighted sum, in which each term may have its own beta: "
        "dpo_norm=1.0,ipo:0.1=0.2.",
        metavar="NAME[:BETA][=WEIGHT],...",
    )
    beta: float | None = for_loss(
        None, help="How strongly the policy is held to the reference.", default_text="the loss's own", above=0
    )
    label_smoothing: float | None = for_loss(
        None,
        help="Assumed share of pairs with swapped labels.",
        default_text="0; 0.001 for exo_pair",
        minimum=0.0,
        maximum=0.5,
    )
    gamma_beta_ratio: float | None = for_loss(
        None, help="Target margin of simpo, divided by beta.", default_text=str(DEFAULT_GAMMA_BETA_RATIO), minimum=0
    )
    f_divergence: str = for_loss(
        "reverse_kl", help="Divergence that holds the policy to the reference.", choices=F_DIVERGENCES
    )
    f_alpha: float | None = for_loss(
        None, help="Alpha of --f-divergence alpha, between 0 and 1.", default_text=str(DEFAULT_F_ALPHA), above=0
    )
    ld_alpha: float | None = for_loss(
        None,
        help="LD-DPO: weight of the longer response's tokens beyond the length of the shorter one.",
        default_text="1",
        minimum=0.0,
        maximum=1.0,
    )
    nll_coef: float = for_loss(
        0.0,
        help="Weight of the chosen response's negative log-likelihood per token, added to the loss.",
        minimum=0.0,
    )
    load_balancing_loss: bool = for_loss(False, help="Add the auxiliary loss that balances a mixture of experts.")
    load_balancing_weight: float | None = for_loss(
        None, help="Weight of the auxiliary loss.", default_text=str(DEFAULT_LOAD_BALANCING_WEIGHT), above=0
    )

    global_batch_size: int | None = for_optimization(
        None, help="Pairs per update, over all GPUs.", default_text=str(DEFAULT_GLOBAL_BATCH_SIZE), minimum=1
    )
    per_device_train_batch_size: int | None = for_optimization(
        None,
        help="With --gradient-accumulation-steps, another way to set the pairs per update: the product of the two and "
        "the number of GPUs. It does not affect memory; see --tokens-per-microbatch.",
        minimum=1,
    )
    gradient_accumulation_steps: int | None = for_optimization(
        None, help="See --per-device-train-batch-size.", minimum=1
    )
    num_train_epochs: float = for_optimization(1.0, help="Passes over the mixture.", above=0)
    max_steps: int | None = for_optimization(
        None, help="Number of updates; overrides --num-train-epochs and sets the schedule's length.", minimum=1
    )
    learning_rate: float = for_optimization(5e-7, help="Peak learning rate.", minimum=0)
    lr_scheduler_type: str = for_optimization(
        "linear", help="Shape of the learning rate after the warm-up.", choices=SCHEDULES
    )
    warmup_ratio: float = for_optimization(0.1, help="Share of the updates spent warming up.", minimum=0.0, maximum=1.0)
    weight_decay: float = for_optimization(
        0.0, help="AdamW's decoupled weight decay. Biases and norms are not decayed.", minimum=0.0
    )
    adam_beta1: float = for_optimization(
        0.9, help="AdamW's decay rate for the mean of the gradients.", minimum=0.0, below=1
    )
    adam_beta2: float = for_optimization(
        0.999, help="AdamW's decay rate for the mean of their squares.", minimum=0.0, below=1
    )
    adam_epsilon: float = for_optimization(1e-8, help="AdamW's epsilon.", above=0)
    max_grad_norm: float = for_optimization(1.0, help="Clip gradients to this norm; 0 for no clipping.", minimum=0.0)
    seed: int = for_optimization(42, help="Seed for the order of pairs and an adapter's initial weights.", minimum=0)

    tokens_per_microbatch: int | None = for_memory(
        None,
        help="Tokens in one forward and backward pass; a longer pair goes alone. More is faster as long as it fits. "
        "Affects memory and speed, not results.",
        default_text="the longest pair",
        minimum=1,
    )
    gradient_checkpointing: bool = for_memory(
        False, help="Recompute activations in the backward pass: less memory, about a third more computation."
    )
    activation_memory_budget: float | None = for_memory(
        None,
        help="Share of the layers that keep their activations, evenly spread: 0 recomputes all, as "
        "--gradient-checkpointing does.",
        default_text="1, or 0 with --gradient-checkpointing",
        minimum=0.0,
        maximum=1.0,
    )
    num_gpus: int | None = for_memory(
        None, help="Processes, one per GPU.", default_text="all GPUs; one process on a CPU", minimum=1
    )
    zero_stage: int = for_memory(
        3,
        help="What is partitioned across ranks. 0: nothing; 1: optimizer state; 2: also gradients; 3: also weights.",
        minimum=0,
        maximum=3,
    )
    offload_optimizer: bool = for_memory(False, help="Keep optimizer state and master weights in host memory.")
    offload_parameters: bool = for_memory(False, help="Keep partitioned weights in host memory, at stage 3.")
    zero_hpz_partition_size: int = for_memory(
        1,
        help="Ranks that share a second copy of the weights, usually those of a node; 1 for no second copy.",
        minimum=1,
    )
    use_liger_kernel: bool = for_memory(
        False, help="Use Liger's kernels for rotary embedding, norms and MLPs, on a GPU."
    )

    eval_mixture: str | None = for_evaluation(None, help="Mixture of held-out pairs.", default_text="no evaluation")
    eval_steps: int | None = for_evaluation(
        None,
        help="Evaluate every N updates, in addition to before the first and after the last.",
        default_text="only before the first and after the last",
        minimum=1,
    )
    keep_best: str | None = for_evaluation(
        None,
        help="Also keep the model with the best held-out reward, in OUTPUT/best.",
        choices=("accuracy", "margin"),
    )

    checkpointing_steps: int | None = for_checkpoints(
        500, help="Save a checkpoint every N updates. One is saved at the end too.", minimum=1
    )
    keep_last_n_checkpoints: int = for_checkpoints(
        3, help="Number of newest checkpoints to keep; -1 keeps all.", minimum=-1
    )
    model_saving_steps: int | None = for_checkpoints(
        None,
        help="Also save the model every N updates, in OUTPUT/models/step_N. All are kept.",
        default_text="only at the end",
        minimum=1,
    )
    resume: str | None = for_checkpoints(
        None,
        help="Continue from the newest complete checkpoint, or from the one named.",
        flag_value="latest",
        metavar="[latest|PATH]",
    )
    stop_after_steps: int | None = for_checkpoints(
        None,
        help="Stop after N updates and save a checkpoint to resume from; the schedule stays that of the whole run.",
        minimum=1,
    )

    logging_steps: int = for_logging(1, help="Write a line of metrics every N updates.", minimum=1)
    with_tracking: bool = for_logging(False, help="Also log to Weights & Biases.")
    wandb_project: str = for_logging("dpo-cache", help="Weights & Biases project.")
    wandb_entity: str | None = for_logging(None, help="Weights & Biases entity.")
    wandb_tags: tuple[str, ...] = for_logging(
        (), help="Tag of the run at Weights & Biases. May be repeated.", metavar="TAG"
    )
    with_tensorboard: bool = for_logging(False, help="Also write TensorBoard event files, to OUTPUT/tensorboard.")
    run_name: str | None = for_logging(
        None, help="Name of the run in trackers.", default_text="the output folder's name"
    )

    push_to_hub: bool = for_hub(False, help="Upload the trained model to the Hugging Face Hub at the end.")
    hub_model_id: str | None = for_hub(
        None, help="Repository on the Hub.", default_text="the run's name, in your namespace", metavar="OWNER/NAME"
    )
    hub_revision: str | None = for_hub(None, help="Branch of the repository.", default_text="the run's name")
    hub_private: bool = for_hub(True, help="Make the repository private if it is new.", default_text="private")

    plan: bool = for_trial(False, help="Print all resolved settings and warnings without loading the model.")
    dry_run: bool = for_trial(
        False, help="Run the heaviest batch forward and backward and report memory and time, without training."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self.resolved_objective()  # says what is wrong with it before anything is opened
        self._refuse_ignored_options()
        self._refuse_contradictions()
        if self.keep_last_n_checkpoints == 0:
            raise DpoCacheError("--keep-last-n-checkpoints is 0", expected="1 or more, or -1 to keep all")

    def _refuse_ignored_options(self) -> None:
        """Refuse options without the one that gives them a meaning."""
        refuse_ignored(
            self,
            *("lora_rank", "lora_alpha", "lora_target_modules", "merge"),
            without="--use-lora",
            is_given=self.use_lora or self.use_qlora,
        )
        refuse_ignored(
            self, "load_balancing_weight", without="--load-balancing-loss", is_given=self.load_balancing_loss
        )
        refuse_ignored(
            self, "hub_model_id", "hub_revision", "hub_private", without="--push-to-hub", is_given=self.push_to_hub
        )
        refuse_ignored(
            self, "wandb_project", "wandb_entity", "wandb_tags", without="--with-tracking", is_given=self.with_tracking
        )
        refuse_ignored(self, "model_revision", without="--model", is_given=bool(self.model))
        refuse_ignored(self, "eval_steps", "keep_best", without="--eval-mixture", is_given=bool(self.eval_mixture))
        refuse_idle_partitions(
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            hierarchical_partition_size=self.zero_hpz_partition_size,
        )

    def _refuse_contradictions(self) -> None:
        """Refuse options that cannot be given together."""
        per_device = (self.per_device_train_batch_size, self.gradient_accumulation_steps)
        if self.global_batch_size is not None and per_device != (None, None):
            raise DpoCacheError(
                "--global-batch-size is given together with --per-device-train-batch-size or "
                "--gradient-accumulation-steps",
                expected="one way to give the pairs per update",
            )
        if self.use_qlora and self.zero_stage == 3:
            raise DpoCacheError(
                "--use-qlora is given with --zero-stage 3 (the default), which cannot partition quantized weights",
                expected="stage 0, 1 or 2; every GPU then holds all the weights, quantized to a quarter of their size",
                next_step="add --zero-stage 2",
            )
        if self.keep_best is not None and not self.resolved_objective().uses_reference:
            raise DpoCacheError(
                f"--keep-best judges by rewards, and --loss {self.loss} has none", expected="a loss with a reference"
            )
        if self.gradient_checkpointing and self.activation_memory_budget is not None:
            raise DpoCacheError(
                "--gradient-checkpointing and --activation-memory-budget are given together",
                expected="one of them",
                next_step="leave out --gradient-checkpointing: a budget of 0 means the same",
            )
        if self.plan and self.dry_run:
            raise DpoCacheError("--plan and --dry-run are given together", expected="one of them")

    @property
    def resolved_run_name(self) -> str:
        """The run's name in trackers and on the Hub."""
        return self.run_name or self.output.resolve().name

    @property
    def share_of_kept_activations(self) -> float:
        """Share of the layers that keep their activations for the backward pass."""
        if self.activation_memory_budget is not None:
            return self.activation_memory_budget
        return 0.0 if self.gradient_checkpointing else 1.0

    @property
    def quantization(self) -> str | None:
        """What the policy's own weights are quantized to; None where they are left as they are."""
        return "nf4" if self.use_qlora else None

    @property
    def saves_adapter(self) -> bool:
        """Whether the result is an adapter, not a whole model."""
        return self.resolved_lora() is not None and not self.merge

    def resolved_lora(self) -> dict[str, Any] | None:
        """The adapter's numbers; None where the policy itself is trained."""
        if not (self.use_lora or self.use_qlora):
            return None
        return {
            "rank": self.lora_rank or DEFAULT_LORA_RANK,
            "alpha": self.lora_alpha or DEFAULT_LORA_ALPHA,
            "target_modules": list(self.lora_target_modules or ("all-linear",)),
            **({"quantization": self.quantization} if self.quantization else {}),
        }

    def resolved_objective(self) -> Objective:
        """What is minimised, with all its numbers."""
        return resolve_objective(
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
        return (self.load_balancing_weight or DEFAULT_LOAD_BALANCING_WEIGHT) if self.load_balancing_loss else None

    def resolved_global_batch_size(self, num_ranks: int) -> int:
        """Pairs in one update on ``num_ranks`` ranks."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        if self.per_device_train_batch_size is None and self.gradient_accumulation_steps is None:
            return DEFAULT_GLOBAL_BATCH_SIZE
        return (self.per_device_train_batch_size or 1) * (self.gradient_accumulation_steps or 1) * num_ranks

"""What to write instead of an option of another trainer, or why there is no such option here.

The names are those of TRL and open-instruct. Losses have a table of their own, in ``pipeline.training.objective``.
"""

from __future__ import annotations

_NO_PARALLEL_LAYERS = (
    "tensor, context and sequence parallelism are not supported; dpo-train --zero-stage 3 (the default) partitions the "
    "weights, and --tokens-per-microbatch and --gradient-checkpointing bound the activations"
)
_FIXED_REFERENCE = (
    "the reference does not change during training (no TR-DPO), or its values could not be cached; to move it, save "
    "the model, build a cache with it, and train again"
)
_NO_DROPOUT = "there is no dropout: the reference was scored without, and the policy must reproduce its values"
_ADAMW_ONLY = "AdamW is the only optimizer; dpo-train --offload-optimizer keeps its state in host memory"
_ONE_SPEC = "use dpo-cache build --dataset PATH_OR_ID,split=…,amount=…, once for each dataset"

INSTEAD = {
    # the model and its reference
    "model_name_or_path": "use --model",
    "ref_model": "use dpo-cache build --model; dpo-train reads its values from --cache and never loads it",
    "ref_model_revision": "use dpo-cache build --model-revision",
    "ref_model_init_kwargs": "use the options of dpo-cache build: --model-revision, --dtype, --attn-implementation",
    "model_init_kwargs": "use the options of dpo-cache build: --model-revision, --dtype, --attn-implementation",
    "tokenizer_name_or_path": "use dpo-cache build --tokenizer",
    "tokenizer_revision": "use dpo-cache build --tokenizer with a folder; from the Hub it is read at its newest commit",
    "processing_class": "use dpo-cache build --tokenizer",
    "precompute_ref_log_probs": "leave it out: dpo-cache build always does this",
    "precompute_ref_batch_size": "use dpo-cache build --tokens-per-batch, a number of tokens",
    "cache_logprobs_only": "use dpo-cache build, which does nothing else",
    "reference_logprobs_cache_path": "use --cache",
    "sync_ref_model": _FIXED_REFERENCE,
    "ref_model_mixup_alpha": _FIXED_REFERENCE,
    "ref_model_sync_steps": _FIXED_REFERENCE,
    "reference_free": "use dpo-train --loss simpo, the loss that uses no reference",
    "additional_model_arguments": "write them into the config.json of a copy of the model",
    # data and tokens
    "train_dataset": _ONE_SPEC,
    "dataset_name": _ONE_SPEC,
    "mixer_list": _ONE_SPEC,
    "dataset_mixer": _ONE_SPEC,
    "dataset_mixer_list": _ONE_SPEC,
    "mixer_list_splits": _ONE_SPEC,
    "dataset_mixer_list_splits": _ONE_SPEC,
    "eval_dataset": "use dpo-cache build --mixture held-out for these pairs, then dpo-train --eval-mixture",
    "max_train_samples": "use dpo-cache build --dataset PATH_OR_ID,amount=N, which draws other rows",
    "transform_fn": "use dpo-cache build --mask open-instruct-all-turns, open-instruct-last-turn or last-turn",
    "chat_template_name": "use dpo-cache build --chat-template",
    "chat_template_path": "use dpo-cache build --chat-template",
    "add_bos": "use dpo-cache build --chat-template tulu-bos, or a template of your own that writes the bos",
    "max_length": "use dpo-cache build --max-seq-length",
    "max_seq_length": "use dpo-cache build --max-seq-length",
    "max_prompt_length": "use dpo-cache build --max-seq-length with --truncation truncate-prompt-left",
    "max_completion_length": "use dpo-cache build --max-seq-length with --truncation truncate-response-right",
    "truncation_mode": "use dpo-cache build --truncation truncate-response-right for keep_start",
    "padding_free": "leave it out: the fastest layout that the model allows is chosen automatically",
    "packing": "leave it out: the fastest layout that the model allows is chosen automatically",
    "concatenated_forward": "leave it out: this is always done",
    # the loss
    "loss_type": "use dpo-train --loss",
    "dpo_loss_type": "use dpo-train --loss",
    "loss_weights": "use a weighted sum, such as dpo-train --loss dpo=1.0,apo_zero=0.5",
    "dpo_beta": "use dpo-train --beta",
    "dpo_label_smoothing": "use dpo-train --label-smoothing",
    "dpo_gamma_beta_ratio": "use dpo-train --gamma-beta-ratio",
    "f_divergence_type": "use dpo-train --f-divergence",
    "f_alpha_divergence_coef": "use dpo-train --f-alpha, which is 1 minus this coefficient",
    "use_weighting": "use dpo-train --loss wpo",
    "rpo_alpha": "use dpo-train --nll-coef",
    "discopop_tau": "it is fixed at 0.05, the value of the paper",
    "router_aux_loss_coef": "use dpo-train --load-balancing-loss with --load-balancing-weight",
    "desirable_weight": "it belongs to KTO, and only losses on pairs are supported",
    "undesirable_weight": "it belongs to KTO, and only losses on pairs are supported",
    # optimization and memory
    "num_epochs": "use dpo-train --num-train-epochs",
    "max_train_steps": "use dpo-train --max-steps",
    "per_device_eval_batch_size": "leave it out: dpo-train --tokens-per-microbatch holds for evaluation too",
    "warmup_steps": "use dpo-train --warmup-ratio, a share of all updates",
    "optim": _ADAMW_ONLY,
    "optimizer_type": _ADAMW_ONLY,
    "use_8bit_optimizer": _ADAMW_ONLY,
    "dpo_use_paged_optimizer": _ADAMW_ONLY,
    "bf16": "use dpo-cache build --dtype bfloat16; dpo-train follows the cache",
    "fp16": "models are trained in bfloat16 or float32: use dpo-cache build --dtype",
    "disable_dropout": _NO_DROPOUT,
    "lora_dropout": _NO_DROPOUT,
    "use_peft": "use dpo-train --use-lora",
    "peft_config": "use dpo-train --use-lora with --lora-rank, --lora-alpha and --lora-target-modules",
    "lora_r": "use dpo-train --lora-rank",
    "load_in_4bit": "use dpo-cache build --quantization nf4, then dpo-train --use-qlora",
    "load_in_8bit": "only four bits are supported: dpo-cache build --quantization nf4, then dpo-train --use-qlora",
    "deepspeed": "use dpo-train --zero-stage; DeepSpeed's file is written from the options",
    "fsdp": "use dpo-train --zero-stage; DeepSpeed is the only training engine",
    "offload_param": "use dpo-train --offload-parameters",
    "activation_offloading": "use dpo-train --gradient-checkpointing, which saves more memory",
    "torch_compile": "there is no option for torch.compile",
    "compile_model": "there is no option for torch.compile",
    **dict.fromkeys(
        (
            *("tensor_parallel_size", "tensor_parallel_degree", "context_parallel_size", "context_parallel_degree"),
            *("sequence_parallel_size", "sequence_parallel_degree", "pipeline_parallel_size", "cp_degree"),
            "parallelism_config",
        ),
        _NO_PARALLEL_LAYERS,
    ),
    # evaluation, checkpoints, trackers, the Hub
    "eval_strategy": "use dpo-train --eval-mixture with --eval-steps, a number of updates",
    "load_best_model_at_end": "use dpo-train --keep-best accuracy, which keeps it in OUTPUT/best",
    "metric_for_best_model": "use dpo-train --keep-best accuracy, or margin",
    "save_steps": "use dpo-train --checkpointing-steps for what a run resumes from, --model-saving-steps for models",
    "save_only_model": "use dpo-train --model-saving-steps",
    "save_strategy": "use dpo-train --checkpointing-steps, a number of updates",
    "save_total_limit": "use dpo-train --keep-last-n-checkpoints",
    "resume_from_checkpoint": "use dpo-train --resume",
    "output_dir": "use dpo-train --output",
    "exp_name": "use dpo-train --output, and --run-name for its name in trackers",
    "report_to": "use dpo-train --with-tracking for Weights & Biases, --with-tensorboard for TensorBoard",
    "hf_repo_id": "use dpo-train --hub-model-id",
    "hf_repo_revision": "use dpo-train --hub-revision",
    "hub_private_repo": "use dpo-train --hub-private, the default",
    "hub_strategy": "use dpo-train --push-to-hub, which uploads the model at the end",
    "try_launch_beaker_eval_jobs": "evaluate the folder OUTPUT/model with your own tools",
}
"""By the option's name in the other trainer, with underscores. Each text goes on after a colon."""


def instead_of(name: str) -> str | None:
    """What to do instead of giving an option of this name, with or without dashes; None for a name not known."""
    return INSTEAD.get(name.lstrip("-").replace("-", "_").lower())

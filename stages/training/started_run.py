"""What a run has once its model is loaded: the engine, at its checkpoint, and what works with it."""

from __future__ import annotations

from dataclasses import dataclass

from ...pipeline.cache.mixture import Mixture
from ...pipeline.scoring.layout_choice import choose_layout
from ...pipeline.scoring.model_loading import load_config, noise_of
from ...pipeline.scoring.pair_scorer import PairScorer
from ...pipeline.scoring.scoring_batch import Layout
from ...pipeline.training.checkpoint_folder import Checkpoint
from ...pipeline.training.deepspeed_config import EngineSettings, deepspeed_config
from ...pipeline.training.expert_blocks import can_be_balanced
from ...pipeline.training.host_memory import fix_mmap_threshold
from ...pipeline.training.policy_engine import PolicyEngine
from ...pipeline.training.resident_memory import resident_bytes_of_ranks
from ...pipeline.training.tensor_headers import checkpoint_dtype
from ..console.byte_size import byte_size
from ..console.terminal import say
from ..processes.devices import share_cores
from .model_writer import ModelWriter
from .policy import load_policy
from .prepared_run import PreparedRun
from .training_loop import MicroBatches, TrainingLoop


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StartedRun:
    """A run that can train.

    Attributes:
        checkpoint: What it resumed from, already loaded; None for a fresh start.
        engine: The policy.
        loop: Updates and evaluations.
        models: Saves the policy for others to load.
    """

    checkpoint: Checkpoint | None
    engine: PolicyEngine
    loop: TrainingLoop
    models: ModelWriter

    @property
    def first_step(self) -> int:
        """Updates that were done before this process."""
        return self.checkpoint.state.step if self.checkpoint else 0


def start_run(run: PreparedRun, checkpoint: Checkpoint | None) -> StartedRun:
    """Load the policy and start its engine; collective.

    Args:
        run: What was prepared.
        checkpoint: What to resume from; None for a fresh start.

    Raises:
        DpoCacheError: The model cannot be trained, there is too little room on the disk, or the checkpoint cannot be
            loaded; on all ranks alike.
    """
    saved_dtype = checkpoint_dtype(run.origin.model.folder)  # may refuse the model, so before it is loaded
    engine = _start_engine(run, checkpoint)
    first_step = checkpoint.state.step if checkpoint else 0
    run.checkpoints.check_free_space(engine, saved_dtype, first_step=first_step)
    layout = choose_layout(engine.deepspeed, device=run.device)
    if checkpoint is not None:
        run.checkpoints.load(engine, checkpoint)
    evaluation = run.pairs.eval_mixture
    loop = TrainingLoop(
        engine,
        run.recipe,
        _micro_batches(run, run.pairs.mixture, layout, engine),
        _micro_batches(run, evaluation, layout, engine) if evaluation else None,
    )
    models = ModelWriter(run, engine)
    return StartedRun(checkpoint=checkpoint, engine=engine, loop=loop, models=models)


def _start_engine(run: PreparedRun, checkpoint: Checkpoint | None) -> PolicyEngine:
    config, recipe, model = run.config, run.recipe, run.origin.model
    fix_mmap_threshold()
    if config.offload_optimizer:
        share_cores(run.ranks.ranks_per_node)
    model_config = load_config(model.folder, trust_remote_code=config.trust_remote_code)
    if run.is_main and (noise := noise_of(model_config)):
        names = ", ".join(f"{name} {value:g}" for name, value in noise.items())
        say(f"the model's dropout ({names}) is off, because the reference was scored without it")
    engine_config = deepspeed_config(
        EngineSettings(
            zero_stage=config.zero_stage,
            dtype=recipe.dtype,
            max_grad_norm=config.max_grad_norm,
            num_ranks=run.ranks.num_ranks,
            hidden_size=model_config.get_text_config().hidden_size,
            on_gpu=run.device.type == "cuda",
            offload_optimizer=config.offload_optimizer,
            offload_parameters=config.offload_parameters,
            hierarchical_partition_size=config.zero_hpz_partition_size,
            load_universal=checkpoint is not None and run.checkpoints.is_converted(checkpoint),
        )
    )
    policy = load_policy(config, recipe, model, run.device, engine_config)
    if run.is_main and not config.load_balancing_loss and can_be_balanced(policy):
        say("the loss that balances the model's experts is off; --load-balancing-loss adds it")
    _say_host_memory(run)
    return PolicyEngine(
        PairScorer(policy, load_balancing=config.load_balancing_loss),
        config=engine_config,
        objective=recipe.objective,
        weight_decay=recipe.weight_decay,
        adam_betas=(recipe.adam_beta1, recipe.adam_beta2),
        adam_epsilon=recipe.adam_epsilon,
        bad_batch_path=config.output / "bad_batch.json",
        load_balancing_weight=recipe.load_balancing_weight or 0.0,
    )


def _say_host_memory(run: PreparedRun) -> None:
    of_ranks = resident_bytes_of_ranks()
    if run.is_main:
        say(
            f"host memory after loading: {byte_size(max(of_ranks))} at most on a rank, {byte_size(sum(of_ranks))} over "
            "all ranks"
        )


def _micro_batches(run: PreparedRun, mixture: Mixture, layout: Layout, engine: PolicyEngine) -> MicroBatches:
    return MicroBatches(
        run.pairs.cache,
        mixture,
        layout=layout,
        engine=engine,
        tokens_per_microbatch=run.recipe.tokens_per_microbatch,
    )

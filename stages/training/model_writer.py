"""The policy as a folder that others load: a whole model, or the adapter that was trained on one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...pipeline.training.model_export import export_adapter, export_model
from ...pipeline.training.model_tokenizer import ModelTokenizer, tokenizer_of_pairs
from ...pipeline.training.policy_engine import PolicyEngine
from ..console.terminal import say
from ..hub.model_folder import ModelFolder
from .model_card import model_card
from .recipe import Recipe
from .train_config import TrainConfig
from .training_cache import TrainingCache


class ModelWriter:
    """Writes the policy of one run, as it stands; all ranks call it together.

    Args:
        config: The settings.
        recipe: The resolved numbers.
        pairs: What the run reads.
        base: What training started from.
        engine: The policy.
    """

    def __init__(
        self, config: TrainConfig, recipe: Recipe, pairs: TrainingCache, base: ModelFolder, engine: PolicyEngine
    ) -> None:
        self._config = config
        self._recipe = recipe
        self._pairs = pairs
        self._base = base
        self._engine = engine
        self._tokenizer = ModelTokenizer(base_folder=base.folder)
        if engine.rank == 0:  # the only one that writes
            self._tokenizer = tokenizer_of_pairs(
                pairs.mixture.tokenization, base.folder, trust_remote_code=config.trust_remote_code
            )
            if self._tokenizer.warning is not None:
                say(f"warning: {self._tokenizer.warning}")

    def write(self, folder: Path, line: Mapping[str, float], evaluation: Mapping[str, float] | None) -> None:
        """Save the policy, or its adapter, with a card.

        Args:
            folder: Where to; replaced as a whole.
            line: The last logged step.
            evaluation: The last evaluation.
        """
        base = self._base
        card = model_card(
            self._config,
            self._recipe,
            name=self._config.resolved_run_name,
            base=base,
            cache=self._pairs.cache,
            mixture=self._pairs.mixture,
            last_line=line,
            evaluation=evaluation,
        )
        if not self._config.saves_adapter:
            export_model(
                self._engine,
                folder,
                base_folder=base.folder,
                base_adapter=base.adapter.folder if base.adapter else None,
                tokenizer=self._tokenizer,
                trust_remote_code=self._config.trust_remote_code,
                card=card,
            )
            return
        name = base.name if base.commit else str(base.folder)
        export_adapter(self._engine, folder, base=name, revision=base.commit, tokenizer=self._tokenizer, card=card)

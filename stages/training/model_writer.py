"""The policy as a folder that others load: a whole model, or the adapter that was trained on one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...pipeline.data.printable_text import one_line
from ...pipeline.training.model_export import export_adapter, export_model
from ...pipeline.training.model_tokenizer import ModelTokenizer, tokenizer_of_pairs
from ...pipeline.training.policy_engine import PolicyEngine
from ..console.terminal import say
from .model_card import model_card
from .prepared_run import PreparedRun


class ModelWriter:
    """Writes the policy of one run, as it stands; all ranks call it together.

    Args:
        run: What was prepared.
        engine: The policy.
    """

    def __init__(self, run: PreparedRun, engine: PolicyEngine) -> None:
        self._run = run
        self._engine = engine
        base = run.origin.model.folder
        self._tokenizer = ModelTokenizer(base_folder=base)
        if run.is_main:  # the only one that writes
            self._tokenizer = tokenizer_of_pairs(
                run.pairs.mixture.tokenization, base, trust_remote_code=run.config.trust_remote_code
            )
            if self._tokenizer.warning is not None:
                say(f"warning: {one_line(self._tokenizer.warning)}")

    def write(self, folder: Path, line: Mapping[str, float], evaluation: Mapping[str, float] | None) -> None:
        """Save the policy, or its adapter, with a card.

        Args:
            folder: Where to; replaced as a whole.
            line: The last logged step.
            evaluation: The last evaluation.
        """
        config, base = self._run.config, self._run.origin.model
        card = model_card(self._run, line, evaluation)
        if not config.saves_adapter:
            export_model(
                self._engine,
                folder,
                base_folder=base.folder,
                base_adapter=base.adapter_folder,
                tokenizer=self._tokenizer,
                trust_remote_code=config.trust_remote_code,
                card=card,
            )
            return
        name = base.name if base.commit else str(base.folder)
        export_adapter(self._engine, folder, base=name, revision=base.commit, tokenizer=self._tokenizer, card=card)

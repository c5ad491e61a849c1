"""Which reference a build scores with, and how its rows become tokens: all that decides what can be reused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...pipeline.cache.canonical_json import JsonObject
from ...pipeline.cache.reference_identity import ReferenceIdentity, code_that_runs, identify_reference
from ...pipeline.data.named_path import named_path
from ...pipeline.data.tokenization_settings import TokenizationSettings
from ...pipeline.data.tokenizer_files import TOKENIZER_FILES
from ...pipeline.scoring.attention_choice import resolve_attention
from ...pipeline.scoring.model_loading import load_config
from ...pipeline.scoring.pair_scorer import SCORING_VERSION
from ..hub.model_folder import ModelFolder, find_model_folder
from ..hub.recorded_reference import RecordedReference
from .build_config import BuildConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReference:
    """A reference as a build's settings and this machine resolve it; no weights are loaded.

    Attributes:
        model: Its files, with those of a peft adapter on top of it.
        vocab_size: How many tokens the model has embeddings for; None where its config does not say.
        identity: What its values depend on.
        tokenization: How rows become tokens.
    """

    model: ModelFolder
    vocab_size: int | None
    identity: ReferenceIdentity
    tokenization: TokenizationSettings

    def names(self) -> JsonObject:
        """Where its files came from, for people and for who has to find them again."""
        adapter = self.model.adapter
        return RecordedReference(
            model=_lasting_name(self.model),
            commit=self.model.commit,
            adapter=_lasting_name(adapter) if adapter else None,
            adapter_commit=adapter.commit if adapter else None,
        ).to_json()


def resolve_reference(config: BuildConfig) -> BuildReference:
    """Find the reference's files and identify them.

    Raises:
        DpoCacheError: The model cannot be found, or its files are no model that we can score with.
    """
    model = find_model_folder(config.model, config.model_revision)
    if config.adapter:
        model = replace(model, adapter=find_model_folder(config.adapter, config.adapter_revision))
    tokenizer = find_model_folder(config.tokenizer, None, files=TOKENIZER_FILES) if config.tokenizer else model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if config.trust_remote_code:
        code_that_runs(model.folder)  # refuses code from elsewhere before any of it is fetched
    model_config = load_config(model.folder, trust_remote_code=config.trust_remote_code)
    return BuildReference(
        model=model,
        vocab_size=getattr(model_config.get_text_config(), "vocab_size", None),
        identity=identify_reference(
            model.folder,
            adapter_folder=model.adapter_folder,
            weight_dtype=dtype,
            compute_dtype=dtype,
            attention=resolve_attention(config.attn_implementation, model_config, device),
            scoring_version=SCORING_VERSION,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
        ),
        tokenization=TokenizationSettings(
            tokenizer=_lasting_name(tokenizer),
            tokenizer_revision=tokenizer.commit,
            chat_template=config.chat_template,
            max_seq_length=config.max_seq_length,
            truncation=config.truncation,
            mask=config.mask,
            trust_remote_code=config.trust_remote_code,
        ),
    )


def _lasting_name(model: ModelFolder) -> str:
    """What finds it again from another working folder."""
    return model.name if model.commit else str(named_path(model.name).absolute())

"""Which reference a cache belongs to: everything that can change one of its log-probabilities, and nothing else.

Names, paths, revisions, library versions and hardware are recorded beside the identity, not in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from .canonical_json import JsonObject, canonical_bytes, parse_object, read_bounded, take
from .message_value import message_value
from .weights_digest import MODEL_FILE, MODEL_INDEX, files_digest, weights_digest

MAX_CONFIG_BYTES = 4 << 20

HARMLESS_CONFIG_KEYS = frozenset(
    {
        # Where it came from and what wrote it.
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version",
        # Fields of the identity in their own right: the dtype and kernel that really scored.
        "torch_dtype", "dtype", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
        "_attn_implementation_internal",
        # Scoring runs without dropout.
        "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_dropout", "attn_pdrop",
        "classifier_dropout", "dropout", "embd_pdrop", "embedding_dropout", "emb_pdrop", "ffn_dropout",
        "hidden_dropout", "hidden_dropout_prob", "layerdrop", "resid_dropout", "resid_pdrop",
        "residual_dropout", "summary_first_dropout",
        # Heads for classification, generation, and what a forward returns beside the logits.
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
        "bos_token_id", "eos_token_id", "use_cache", "output_attentions", "output_hidden_states",
        "output_router_logits", "return_dict", "return_dict_in_generate",
        # Only training reads these.
        "gradient_checkpointing", "initializer_range", "router_aux_loss_coef",
    }
)  # fmt: skip
"""Keys of ``config.json`` that cannot change a log-probability. Any other key counts, known or
not: ``architectures`` too, because it picks the class where a model type has several, and ``pad_token_id``,
from which some models derive positions."""

HARMLESS_ADAPTER_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
        "task_type",
    }
)  # fmt: skip


_OPTIONAL_MEMBERS = frozenset({"quantization", "remote_code_sha256"})
"""Absent from JSON where they say nothing, so that references that need none keep the identity they had."""
_CLASSES_THAT_RUN = ("AutoConfig", "AutoModelForCausalLM")
"""Entries of ``auto_map`` from which a model is loaded here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceIdentity:
    """What a reference's values depend on.

    Attributes:
        weights_sha256: :func:`~.weights_digest.weights_digest` of the base model.
        adapter_sha256: Digest of the adapter's tensors and settings; None without one.
        config: ``config.json`` without :data:`HARMLESS_CONFIG_KEYS`.
        weight_dtype: Dtype of the weights while scoring, such as ``bfloat16``.
        compute_dtype: Dtype of the matrix products.
        attention: Class of the attention kernel, such as ``sdpa``.
        scoring_version: Version of our scoring code.
        quantization: What the weights were quantized to after they had :attr:`weight_dtype`, such as ``nf4``; None
            for weights as they are, which then has no member in JSON.
        remote_code_sha256: Digest of the Python code that came with the model and computed its values; None, without a
            member in JSON, where a class of transformers did.
    """

    weights_sha256: str
    adapter_sha256: str | None
    config: JsonObject
    weight_dtype: str
    compute_dtype: str
    attention: str
    scoring_version: int
    quantization: str | None = None
    remote_code_sha256: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 in hex over the canonical JSON of :meth:`to_json`."""
        return hashlib.sha256(canonical_bytes(self.to_json())).hexdigest()

    def to_json(self) -> JsonObject:
        """The identity as ``cache.json`` holds it."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in members.items() if value is not None or name not in _OPTIONAL_MEMBERS}

    @property
    def precision(self) -> str:
        """What was computed in, for people: ``bfloat16``, or ``bfloat16 on nf4 weights``."""
        return (
            self.compute_dtype if self.quantization is None else f"{self.compute_dtype} on {self.quantization} weights"
        )

    @classmethod
    def from_json(cls, value: JsonObject, *, source: Path) -> ReferenceIdentity:
        """Read an identity back.

        Raises:
            DpoCacheError: A field is missing, unknown, or of another type.
        """
        unknown = sorted((set(value) | _OPTIONAL_MEMBERS) ^ {field.name for field in fields(cls)})
        if unknown:
            raise DpoCacheError(f"{source}: the identity lacks or does not know the field {unknown[0][:100]!r}")
        adapter = value["adapter_sha256"]
        optional = {name: take(value, name, str, source=source) for name in _OPTIONAL_MEMBERS if name in value}
        return cls(
            weights_sha256=take(value, "weights_sha256", str, source=source),
            adapter_sha256=None if adapter is None else take(value, "adapter_sha256", str, source=source),
            config=take(value, "config", dict, source=source),
            weight_dtype=take(value, "weight_dtype", str, source=source),
            compute_dtype=take(value, "compute_dtype", str, source=source),
            attention=take(value, "attention", str, source=source),
            scoring_version=take(value, "scoring_version", int, source=source),
            **optional,
        )


def differences(ours: ReferenceIdentity, theirs: ReferenceIdentity) -> list[tuple[str, Any, Any]]:
    """Fields in which two identities differ, with both values; the config key by key (``config.rope_theta``).

    A key that one side lacks has the value None there.
    """
    return _different_members(ours.to_json(), theirs.to_json(), prefix="")


def differences_in_words(differing: list[tuple[str, Any, Any]]) -> str:
    """Fields in which a cache's identity, the first value, differs from the one that was asked for."""
    return "; ".join(
        f"{name}: cached {message_value(ours)}, asked for {message_value(theirs)}" for name, ours, theirs in differing
    )


def identify_reference(
    model_folder: Path,
    *,
    adapter_folder: Path | None,
    weight_dtype: str,
    compute_dtype: str,
    attention: str,
    scoring_version: int,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> ReferenceIdentity:
    """Identify a reference from the files of a local model folder, without loading it.

    Args:
        model_folder: The model.
        adapter_folder: A peft adapter on top of it.
        weight_dtype, compute_dtype, attention, scoring_version, quantization: As in :class:`ReferenceIdentity`.
        trust_remote_code: Whether Python code that comes with the model runs where transformers has a class too.

    Raises:
        DpoCacheError: Weights or configuration are missing or damaged, or code from another repository would run.
    """
    return ReferenceIdentity(
        weights_sha256=weights_digest(model_folder),
        adapter_sha256=None if adapter_folder is None else _adapter_digest(adapter_folder),
        config=_config_that_counts(model_folder),
        weight_dtype=weight_dtype,
        compute_dtype=compute_dtype,
        attention=attention,
        scoring_version=scoring_version,
        quantization=quantization,
        remote_code_sha256=_remote_code_digest(model_folder) if trust_remote_code else None,
    )


def _read_config(model_folder: Path) -> JsonObject:
    path = model_folder / "config.json"
    return parse_object(read_bounded(path, max_bytes=MAX_CONFIG_BYTES), source=path)


def _remote_code_digest(model_folder: Path) -> str | None:
    """Digest of the names and bytes of all Python files of the folder; None where none of them is the model."""
    entries = code_that_runs(model_folder)
    if not entries:
        return None
    files = [
        [file.relative_to(model_folder).as_posix(), _code_sha256(file)]
        for file in sorted(model_folder.rglob("*.py"), key=lambda file: file.relative_to(model_folder).as_posix())
    ]
    return hashlib.sha256(canonical_bytes([entries, files])).hexdigest()


def code_that_runs(model_folder: Path) -> JsonObject:
    """The entries of ``auto_map`` whose code is the model, if code that comes with it may run.

    Raises:
        DpoCacheError: The code lies in another repository, whose bytes may change at any time.
    """
    auto_map = _read_config(model_folder).get("auto_map")
    if not isinstance(auto_map, dict):
        return {}
    entries = {name: auto_map[name] for name in _CLASSES_THAT_RUN if name in auto_map}
    for entry in entries.values():
        if "--" in str(entry):
            raise DpoCacheError(
                f"{model_folder}/config.json takes the model's code from another repository: {entry!r}",
                expected="code that lies beside the weights, so that its bytes are part of the reference",
                next_step="copy that repository's *.py files into the folder and name them in auto_map without what "
                "stands before '--'; or leave --trust-remote-code out, where transformers has a class for the model",
            )
    return entries


def _code_sha256(file: Path) -> str:
    return hashlib.sha256(read_bounded(file, max_bytes=MAX_CONFIG_BYTES)).hexdigest()


def _config_that_counts(model_folder: Path) -> JsonObject:
    counted = _without(_read_config(model_folder), HARMLESS_CONFIG_KEYS)
    if counted.get("transformers_weights") is not None:
        raise DpoCacheError(
            f"{model_folder}/config.json takes the weights from {str(counted['transformers_weights'])[:200]!r}",
            expected=f"{MODEL_FILE} or {MODEL_INDEX}, whose digest is that of the reference",
            next_step="remove transformers_weights from config.json, and give the file it names the usual name",
        )
    if "auto_map" in counted:  # the model brings its own code, and that computes the log-probabilities
        counted["auto_map_code_sha256"] = {code.name: _code_sha256(code) for code in sorted(model_folder.glob("*.py"))}
    return counted


def _adapter_digest(adapter_folder: Path) -> str:
    weights = adapter_folder / "adapter_model.safetensors"
    settings = adapter_folder / "adapter_config.json"
    for path in (weights, settings):
        if not path.exists():
            raise DpoCacheError(
                f"{adapter_folder} is not a peft adapter with safetensors weights: {path.name} is missing",
                next_step="save it with peft's save_pretrained(folder, safe_serialization=True)",
            )
    config = parse_object(read_bounded(settings, max_bytes=MAX_CONFIG_BYTES), source=settings)
    counted = {name: _sorted_names(value) for name, value in _without(config, HARMLESS_ADAPTER_KEYS).items()}
    return hashlib.sha256(canonical_bytes([files_digest([weights]), counted])).hexdigest()


def _sorted_names(value: Any) -> Any:
    """peft writes its sets of module names in an arbitrary order."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _without(config: JsonObject, names: frozenset[str]) -> JsonObject:
    """A config without these keys, in its sub-models' configs (``text_config``) neither."""
    return {
        name: _without(value, names) if _is_sub_config(name, value) else value
        for name, value in config.items()
        if name not in names
    }


def _is_sub_config(name: str, value: object) -> bool:
    return isinstance(value, dict) and name.endswith("_config") and name != "quantization_config"


def _different_members(ours: JsonObject, theirs: JsonObject, *, prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name in sorted(set(ours) | set(theirs)):
        left, right = ours.get(name), theirs.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _different_members(left, right, prefix=f"{prefix}{name}.")
        elif canonical_bytes(left) != canonical_bytes(right):
            found.append((prefix + name, left, right))
    return found

"""The tokenizer of a trained model: the one that made its pairs, with the chat template they were rendered with.

A policy that was trained on one template and is prompted with another responds worse, and nothing says why. So what a
mixture records of its tokens decides what ``model/`` holds; the base checkpoint's files stand where it agrees.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DpoCacheError
from ..data.chat_template import resolve_chat_template, without_fixed_date
from ..data.tokenizer import load_tokenizer, tokenizer_sha256, vocabulary_sha256

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
NAMED_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTokenizer:
    """What is written beside the weights.

    Attributes:
        base_folder: The checkpoint that training started from.
        other: The tokenizer that made the pairs, where it is not the checkpoint's.
        chat_template: Text of the template that the pairs were rendered with, where it is not the tokenizer's own.
        warning: What could not be done.
    """

    base_folder: Path
    other: Any = None
    chat_template: str | None = None
    warning: str | None = None

    def write(self, folder: Path) -> None:
        """Put its files into a model's folder.

        Raises:
            OSError: One could not be written.
        """
        if self.other is not None:
            try:
                self.other.save_pretrained(folder)
            except Exception as error:
                if type(error) is not Exception:
                    raise
                raise OSError(str(error)) from error  # tokenizers has no other class for a full disk
        else:
            self._copy_files(folder)
        if self.chat_template is not None:
            shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)  # one template rendered every pair
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", errors="replace")

    def _copy_files(self, folder: Path) -> None:
        for name in FILES:
            if (self.base_folder / name).is_file():
                shutil.copyfile(self.base_folder / name, folder / name)
        for code in self._own_code():
            if not (folder / code.name).exists():  # a model's own code was written with its weights
                shutil.copyfile(code, folder / code.name)
        if (self.base_folder / NAMED_TEMPLATES).is_dir():
            shutil.copytree(self.base_folder / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)

    def _own_code(self) -> list[Path]:
        """Python files that the checkpoint's tokenizer cannot be loaded without."""
        config = self.base_folder / "tokenizer_config.json"
        has_code = config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))
        return sorted(self.base_folder.glob("*.py")) if has_code else []


def tokenizer_of_pairs(
    tokenization: Mapping[str, Any], base_folder: Path, *, trust_remote_code: bool = False
) -> ModelTokenizer:
    """Find what a model trained on a mixture is to be prompted with.

    Args:
        tokenization: What the mixture records of how its tokens were made.
        base_folder: The checkpoint that training started from.
        trust_remote_code: Run Python code that comes with that checkpoint's tokenizer. A tokenizer that only the
            mixture names runs none: a cache may come from anyone.
    """
    base = _tokenizer_of_checkpoint(base_folder, trust_remote_code=trust_remote_code)
    if base is not None and _made_by(base, tokenization):
        return ModelTokenizer(base_folder=base_folder, chat_template=_template_to_write(base, tokenization))
    name = (tokenization.get("settings") or {}).get("tokenizer")
    if name is None:
        return ModelTokenizer(base_folder=base_folder)
    try:
        other = _tokenizer_of_mixture(name, tokenization)
    except DpoCacheError as error:
        warning = (
            f"the pairs were made with the tokenizer {name}, which could not be loaded ({error.found}); the trained "
            "model gets that of its base"
        )
        return ModelTokenizer(base_folder=base_folder, warning=warning)
    template = _template_to_write(other, tokenization)
    return ModelTokenizer(base_folder=base_folder, other=other, chat_template=template)


def _tokenizer_of_checkpoint(folder: Path, *, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer; None where it has none."""
    try:
        return load_tokenizer(str(folder), None, trust_remote_code=trust_remote_code)
    except DpoCacheError:
        return None


def _tokenizer_of_mixture(name: str, tokenization: Mapping[str, Any]) -> Any:
    """The tokenizer that the mixture names.

    Raises:
        DpoCacheError: It cannot be loaded, or is not the same any more.
    """
    tokenizer = load_tokenizer(name, tokenization["settings"].get("tokenizer_revision"), trust_remote_code=False)
    if not _made_by(tokenizer, tokenization):
        raise DpoCacheError("it has changed since")
    return tokenizer


def _template_to_write(tokenizer: Any, tokenization: Mapping[str, Any]) -> str | None:
    """The template that the pairs were rendered with; None where it is the tokenizer's own, or none was recorded."""
    text = (tokenization.get("chat_template") or {}).get("text")
    own = resolve_chat_template(tokenizer, None)
    if text is None or (own is not None and own.text == text):
        return None
    return without_fixed_date(text)


def _made_by(tokenizer: Any, tokenization: Mapping[str, Any]) -> bool:
    """Whether this tokenizer made the pairs: compared as a whole, or by its vocabulary where it is not a fast one."""
    whole: str | None = tokenization.get("tokenizer_sha256")
    vocabulary: str | None = tokenization.get("vocabulary_sha256")
    return vocabulary_sha256(tokenizer) == vocabulary if whole is None else tokenizer_sha256(tokenizer) == whole

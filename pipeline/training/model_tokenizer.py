"""The tokenizer of a trained model: the one that made its pairs, with the chat template they were rendered with.

A policy that was trained on one template and is prompted with another answers worse, and nothing says why. So what a
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
        """Put its files into a model's folder."""
        if self.other is not None:
            self.other.save_pretrained(folder)
        else:
            self._copy_files(folder)
        if self.chat_template is not None:
            shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)  # one template rendered every pair
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

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
    try:
        tokenizer = load_tokenizer(str(base_folder), None, trust_remote_code=trust_remote_code)
    except DpoCacheError:  # a checkpoint without one
        tokenizer = None
    other = None
    if tokenizer is None or not _made_by(tokenizer, tokenization):
        settings = tokenization.get("settings") or {}
        name = settings.get("tokenizer")
        if name is None:
            return ModelTokenizer(base_folder=base_folder)
        try:
            other = tokenizer = load_tokenizer(name, settings.get("tokenizer_revision"), trust_remote_code=False)
            if not _made_by(tokenizer, tokenization):
                raise DpoCacheError("it has changed since")
        except DpoCacheError as error:
            warning = f"the pairs were made with the tokenizer {name}, which could not be loaded ({error.found}); "
            return ModelTokenizer(base_folder=base_folder, warning=warning + "the trained model gets that of its base")
    template, own = tokenization.get("chat_template") or {}, resolve_chat_template(tokenizer, None)
    text = template.get("text")
    if text is None or (own is not None and own.text == text):
        return ModelTokenizer(base_folder=base_folder, other=other)
    return ModelTokenizer(base_folder=base_folder, other=other, chat_template=without_fixed_date(text))


def _made_by(tokenizer: Any, tokenization: Mapping[str, Any]) -> bool:
    """Told by the whole tokenizer, or by its vocabulary where it is not a fast one."""
    whole: str | None = tokenization.get("tokenizer_sha256")
    vocabulary: str | None = tokenization.get("vocabulary_sha256")
    return vocabulary_sha256(tokenizer) == vocabulary if whole is None else tokenizer_sha256(tokenizer) == whole

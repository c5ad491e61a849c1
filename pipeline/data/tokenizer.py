"""The tokenizer of a reference: where it comes from, and digests of what it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import AutoTokenizer

from ...errors import DpoCacheError, first_line


def load_tokenizer(name: str, revision: str | None) -> Any:
    """A tokenizer of ``transformers``, from a folder or the Hub; code that comes with it is not run.

    Raises:
        DpoCacheError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more, with long texts
        raise DpoCacheError(
            f"the tokenizer {name} cannot be loaded: {first_line(error)}",
            expected="a folder with tokenizer.json, or a Hub id",
            next_step="name another with --tokenizer",
        ) from error


def vocabulary_sha256(tokenizer: Any) -> str:
    """Digest of which id means which token, in hex: equal for tokenizers whose ids can be read for each other's."""
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        token_bytes = token.encode()
        digest.update(token_id.to_bytes(8, "little") + len(token_bytes).to_bytes(8, "little") + token_bytes)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Digest of the whole tokenizer (merges, normaliser, splitting); None for one that is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    for state_of_last_call in ("truncation", "padding"):
        content.pop(state_of_last_call, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""The tokenizer of a reference: where it comes from, and digests of what it is."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from ...errors import DpoCacheError, first_line
from .tokenizer_files import TOKENIZER_FILES


def load_tokenizer(name: str, revision: str | None, *, trust_remote_code: bool) -> Any:
    """A tokenizer of ``transformers``, from a folder or the Hub.

    Args:
        name: The folder or the id.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that comes with it. Only for who said so now: what a cache names is a
            stranger's.

    Raises:
        DpoCacheError: It cannot be loaded, or not without running its code.
    """
    if not os.path.exists(name) and name.startswith(("/", "./", "../", "~")):  # the Hub would call it a bad id
        raise DpoCacheError(
            f"there is no folder {name}",
            expected="a folder with tokenizer.json, or a Hub id",
            next_step="name another with --tokenizer",
        )
    revision = revision or "main"
    folder = _folder_here(name, revision)
    try:
        # Left out, the setting would mean: ask on the terminal, and run the code after a "y".
        return AutoTokenizer.from_pretrained(folder or name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more, with long texts
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise DpoCacheError(
                f"the tokenizer {name} brings Python code of its own, which was not run",
                next_step="look at the code; --trust-remote-code runs it. Or name another with --tokenizer",
            ) from error
        raise DpoCacheError(
            f"the tokenizer {name} cannot be loaded: {first_line(error)}",
            expected="a folder with tokenizer.json, or a Hub id",
            next_step="name another with --tokenizer",
        ) from error


def _folder_here(name: str, revision: str) -> str | None:
    """Where the files of a tokenizer on the Hub lie on this machine already: then nobody asks the Hub for others."""
    if os.path.isdir(name):
        return None
    try:
        # Only these are asked for: with a README or weights that nobody needed the snapshot would count as incomplete.
        folder = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=list(TOKENIZER_FILES))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder if (Path(folder) / "tokenizer_config.json").exists() else None


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

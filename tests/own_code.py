"""Models and tokenizers that bring Python code of their own; each run of it leaves a mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer_factory import CHATML, write_byte_tokenizer
from transformers import dynamic_module_utils


def use_modules_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers copy such code into this folder, not into the user's."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def write_tokenizer_with_code(folder: Path, mark: Path) -> Path:
    """A byte tokenizer that no class of transformers loads; its own makes ``mark`` when it is imported."""
    write_byte_tokenizer(folder, chat_template=CHATML)
    (folder / "own_tokenizer.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\nPath({str(mark)!r}).touch()\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    path.write_text(json.dumps(config))
    return folder

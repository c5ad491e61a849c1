"""Settings that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncation": "cut"}, "--truncation cut is unknown"),
        ({"mask": "first-turn"}, "--mask first-turn is unknown"),
        ({"max_seq_length": 1}, "--max-seq-length 1 holds no prompt and response"),
        ({"truncation": "truncate-prompt-left"}, "without a length does nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        TokenizationSettings(tokenizer="t", **arguments)

"""The tokenizer of a reference: loaded or named, and its digest."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.tokenizer import load_tokenizer, vocabulary_sha256


def test_the_vocabulary_digest_does_not_move() -> None:
    class TwoTokens:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 0}

    # sha256 of id and length as 8 little-endian bytes each, then the token's bytes, ids in order
    assert vocabulary_sha256(TwoTokens()) == "8bc772ec7631ffbd1d33b5ccd8d4e117871072c412b515be95d8d42ba9218539"


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match=r"the tokenizer .*nothing cannot be loaded"):
        load_tokenizer(str(tmp_path / "nothing"), None)

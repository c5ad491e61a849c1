"""The tokenizer of a reference: loaded or named, code that comes with it, and its digest."""

from __future__ import annotations

import builtins
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from byte_tokenizer_factory import CHATML, write_byte_tokenizer
from cache_factory import fill_cache, make_cache, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.pair_tokenizer import PairTokenizer
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.pipeline.data.tokenizer import load_tokenizer, vocabulary_sha256
from dpo_cache.stages.reporting.shown_pair import decoder_of
from huggingface_hub import constants
from own_code import use_modules_in, write_tokenizer_with_code


def test_the_vocabulary_digest_does_not_move() -> None:
    class TwoTokens:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 0}

    # sha256 of id and length as 8 little-endian bytes each, then the token's bytes, ids in order
    assert vocabulary_sha256(TwoTokens()) == "8bc772ec7631ffbd1d33b5ccd8d4e117871072c412b515be95d8d42ba9218539"


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match=r"there is no folder .*nothing"):
        load_tokenizer(str(tmp_path / "nothing"), None, trust_remote_code=False)


def test_code_that_comes_with_a_tokenizer_runs_only_where_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_modules_in(tmp_path / "modules", monkeypatch)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # what transformers asks where nothing is said
    mark = tmp_path / "ran"
    settings = TokenizationSettings(tokenizer=str(write_tokenizer_with_code(tmp_path / "tokenizer", mark)))
    with pytest.raises(DpoCacheError, match="brings Python code of its own, which was not run") as refused:
        PairTokenizer(settings)
    assert "--trust-remote-code" in str(refused.value.next_step)
    assert not mark.exists()
    assert type(PairTokenizer(replace(settings, trust_remote_code=True)).tokenizer).__name__ == "OwnTokenizer"
    assert mark.exists()


def test_a_cache_cannot_have_code_run_by_whoever_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_modules_in(tmp_path / "modules", monkeypatch)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    mark = tmp_path / "ran"
    write_tokenizer_with_code(tmp_path / "tokenizer", mark)
    mixture = fill_cache(make_cache(tmp_path / "cache"), make_rows(3), shard_rows=3)
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "tokenizer_revision": None, "trust_remote_code": True}
    mixture = replace(mixture, tokenization={"settings": settings, "vocabulary_sha256": "0" * 64})
    _, note = decoder_of(mixture)
    assert "brings Python code of its own, which was not run" in str(note)
    assert not mark.exists()


def test_a_tokenizer_of_the_hub_is_loaded_at_the_commit_that_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--owner--tokens"
    (repository / "refs").mkdir(parents=True)
    for commit, template in (("a" * 40, "old"), ("b" * 40, "new")):
        folder = repository / "snapshots" / commit
        write_byte_tokenizer(folder, chat_template=CHATML + template)
    (repository / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, template in ((None, "new"), ("a" * 40, "old"), ("b" * 40, "new")):
        tokenizer = load_tokenizer("owner/tokens", revision, trust_remote_code=False)
        assert tokenizer.chat_template == CHATML + template
    shutil.rmtree(repository / "snapshots" / ("a" * 40))
    with pytest.raises(DpoCacheError, match="the tokenizer owner/tokens cannot be loaded"):
        load_tokenizer("owner/tokens", "a" * 40, trust_remote_code=False)

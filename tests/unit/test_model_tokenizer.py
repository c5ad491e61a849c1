"""What a trained model is prompted with: the tokenizer and the template that made its pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer_factory import CHATML, write_byte_tokenizer
from dpo_cache.pipeline.data.chat_template import resolve_chat_template
from dpo_cache.pipeline.data.pair_tokenizer import PairTokenizer
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.pipeline.data.tokenizer import load_tokenizer, vocabulary_sha256
from dpo_cache.pipeline.training.model_tokenizer import ModelTokenizer, tokenizer_of_pairs
from own_code import write_tokenizer_with_code

MESSAGES = [{"role": "user", "content": "hello"}]


def _tokenization(folder: Path, *, chat_template: str | None = None) -> dict[str, Any]:
    """What a mixture records, as it comes back from JSON."""
    settings = TokenizationSettings(tokenizer=str(folder), chat_template=chat_template)
    recorded: dict[str, Any] = json.loads(json.dumps(PairTokenizer(settings).description()))
    return recorded


def _written(tokenization: dict[str, Any], base: Path, output: Path) -> Any:
    output.mkdir()
    tokenizer_of_pairs(tokenization, base).write(output)
    return load_tokenizer(str(output), None, trust_remote_code=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(write_byte_tokenizer(tmp_path / "base", chat_template=CHATML))


def test_a_tokenizer_that_made_the_pairs_is_copied_as_it_is(base: Path, tmp_path: Path) -> None:
    _written(_tokenization(base), base, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (base / file.name).read_bytes()


def test_the_template_of_the_pairs_goes_with_the_model(base: Path, tmp_path: Path) -> None:
    written = _written(_tokenization(base, chat_template="tulu"), base, tmp_path / "model")
    expected = load_tokenizer(str(base), None, trust_remote_code=False)
    template = resolve_chat_template(expected, "tulu")
    assert template is not None
    expected.chat_template = template.text
    assert written.apply_chat_template(MESSAGES, tokenize=False) == expected.apply_chat_template(
        MESSAGES, tokenize=False
    )
    assert "<|user|>" in written.apply_chat_template(MESSAGES, tokenize=False)


def test_a_template_that_no_file_can_hold_does_not_keep_the_model_from_being_written(
    base: Path, tmp_path: Path
) -> None:
    """JSON can spell half a pair of UTF-16, and a cache may come from anyone."""
    tokenization = _tokenization(base) | {"chat_template": {"name": "evil", "text": "half a pair \ud800"}}
    assert _written(tokenization, base, tmp_path / "model").chat_template == "half a pair ?"


def test_named_templates_stay_beside_the_default_and_go_where_one_template_rendered_every_pair(tmp_path: Path) -> None:
    several = {"default": CHATML, "tool_use": CHATML + "tools"}
    base = Path(write_byte_tokenizer(tmp_path / "base", chat_template=several))
    assert _written(_tokenization(base), base, tmp_path / "own").chat_template == several
    chosen = _written(_tokenization(base, chat_template="tulu"), base, tmp_path / "chosen")
    assert chosen.chat_template.startswith("{#- Tülu's chat format")


def test_code_that_a_tokenizer_brings_is_written_with_it_and_never_over_that_of_the_model(tmp_path: Path) -> None:
    base = write_tokenizer_with_code(tmp_path / "base", tmp_path / "mark")
    (base / "modeling.py").write_text("old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modeling.py").write_text("new")
    ModelTokenizer(base_folder=base).write(tmp_path / "model")
    assert (tmp_path / "model" / "own_tokenizer.py").read_bytes() == (base / "own_tokenizer.py").read_bytes()
    assert (tmp_path / "model" / "modeling.py").read_text() == "new"

    plain = Path(write_byte_tokenizer(tmp_path / "plain"))
    (plain / "convert.py").touch()
    (tmp_path / "other").mkdir()
    ModelTokenizer(base_folder=plain).write(tmp_path / "other")
    assert not (tmp_path / "other" / "convert.py").exists()


def test_a_date_is_fixed_for_scoring_alone(base: Path, tmp_path: Path) -> None:
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    _written(_tokenization(base, chat_template=str(dated)), base, tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == dated.read_text()


def test_another_tokenizer_of_the_pairs_goes_with_the_model(base: Path, tmp_path: Path) -> None:
    other = Path(write_byte_tokenizer(tmp_path / "other", merges_newlines=True, chat_template=CHATML))
    written = _written(_tokenization(other), base, tmp_path / "model")
    assert vocabulary_sha256(written) == _tokenization(other)["vocabulary_sha256"]
    assert vocabulary_sha256(written) != _tokenization(base)["vocabulary_sha256"]


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_tokenizer_that_is_not_to_be_had_is_named(base: Path, tmp_path: Path, becomes: str) -> None:
    other = Path(write_byte_tokenizer(tmp_path / "other", merges_newlines=True, chat_template=CHATML))
    recorded = _tokenization(other)
    shutil.rmtree(other)
    if becomes == "another":
        write_byte_tokenizer(other, chat_template=CHATML)
    found = tokenizer_of_pairs(recorded, base)
    assert found.warning is not None
    assert str(other) in found.warning
    (tmp_path / "model").mkdir()
    found.write(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_checkpoint_without_a_tokenizer_gets_the_one_of_the_pairs(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    written = _written(_tokenization(base), bare, tmp_path / "model")
    assert vocabulary_sha256(written) == _tokenization(base)["vocabulary_sha256"]


def test_pairs_of_unknown_origin_leave_the_checkpoints_files(base: Path, tmp_path: Path) -> None:
    _written({}, base, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

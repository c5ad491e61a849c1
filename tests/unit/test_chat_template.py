"""Pinned templates render what their formats say; anything unknown is an error."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer_factory import CHATML, write_byte_tokenizer
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.chat_template import resolve_chat_template
from transformers import AutoTokenizer

CONVERSATION = [
    {"role": "system", "content": "Be kind\n"},
    {"role": "user", "content": " Hi"},
    {"role": "assistant", "content": "Hello "},
    {"role": "user", "content": "Bye"},
]
TULU = "<|system|>\nBe kind\n\n<|user|>\n Hi\n<|assistant|>\nHello </s>\n<|user|>\nBye\n"


def tokenizer(folder: Path, **arguments: Any) -> Any:
    return AutoTokenizer.from_pretrained(write_byte_tokenizer(folder, **arguments))


def render(folder: Path, choice: str, messages: list[dict[str, str]], **arguments: Any) -> str:
    loaded = tokenizer(folder)
    template = resolve_chat_template(loaded, choice)
    assert template is not None
    text: str = loaded.apply_chat_template(
        messages, chat_template=template.text, tokenize=False, return_dict=False, **arguments
    )
    return text


@pytest.mark.parametrize(("name", "beginning"), [("tulu", ""), ("tulu-bos", "<s>")])
def test_the_tulu_format_to_the_letter(tmp_path: Path, name: str, beginning: str) -> None:
    answer = [{"role": "assistant", "content": "Ciao"}]
    assert render(tmp_path, name, CONVERSATION) == f"{beginning}{TULU}"
    assert render(tmp_path, name, CONVERSATION, add_generation_prompt=True) == f"{beginning}{TULU}<|assistant|>\n"
    assert render(tmp_path, name, CONVERSATION + answer) == f"{beginning}{TULU}<|assistant|>\nCiao</s>"


NO_FUNCTIONS = " You do not currently have access to any functions. <functions></functions><|im_end|>\n"
ABOUT_OLMO = (
    "<|im_start|>system\nYou are OLMo, a helpful function-calling AI assistant built by Ai2. Your date cutoff is "
    f"November 2024, and your model weights are available at https://huggingface.co/allenai.{NO_FUNCTIONS}"
)


def test_the_olmo_thinker_format_to_the_letter(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>b"}]
    body = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>a</think>b"
    assert render(tmp_path, "olmo-thinker", turns) == f"{ABOUT_OLMO}{body}</s>"
    prompt = render(tmp_path, "olmo-thinker", [*turns, {"role": "user", "content": "Bye"}], add_generation_prompt=True)
    assert prompt == f"{ABOUT_OLMO}{body}<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>"


def test_the_olmo_thinker_format_with_functions(tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "2+3?", "functions": "add(a, b)"},
        {"role": "assistant", "function_calls": "add(2, 3)"},
        {"role": "environment", "content": "5"},
        {"role": "assistant", "content": "5."},
    ]
    assert render(tmp_path, "olmo-thinker", conversation) == (
        f"<|im_start|>system\nBe kind{NO_FUNCTIONS}"
        "<|im_start|>user\n2+3?\n<functions>add(a, b)</functions><|im_end|>\n"
        "<|im_start|>assistant\n<function_calls>add(2, 3)</function_calls><|im_end|>\n"
        "<|im_start|>environment\n5<|im_end|>\n<|im_start|>assistant\n5.</s>"
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("tulu", "eabfd26beb927fb164a55eccf43d605c1b112e21c95e2b62d466e7351fed9a3e"),
        ("tulu-bos", "fc49caff388fc6c4b65712d03eb77cf5d497cc2d286a4face5c189e2e19647da"),
        ("olmo-thinker", "2a9c132fb88185b4a6df7e87078c5071d9d3d6a6db42454e51fd4ff1e1e6fdf1"),
    ],
)
def test_a_changed_pinned_template_is_a_decision(tmp_path: Path, name: str, digest: str) -> None:
    template = resolve_chat_template(tokenizer(tmp_path), name)
    assert template is not None
    assert template.sha256 == hashlib.sha256(template.text.encode()).hexdigest() == digest


def test_without_a_choice_it_is_the_tokenizers_own(tmp_path: Path) -> None:
    template = resolve_chat_template(tokenizer(tmp_path, chat_template=CHATML), None)
    assert template is not None
    assert (template.text, template.name) == (CHATML, "tokenizer")


def test_without_a_choice_and_without_its_own_there_is_none(tmp_path: Path) -> None:
    assert resolve_chat_template(tokenizer(tmp_path), None) is None


def test_one_of_several_templates_is_chosen_by_name(tmp_path: Path) -> None:
    several = tokenizer(tmp_path, chat_template={"default": CHATML, "tool_use": "T" + CHATML})
    by_default, by_name = resolve_chat_template(several, None), resolve_chat_template(several, "tool_use")
    assert by_default is not None
    assert by_name is not None
    assert by_default.text == CHATML
    assert (by_name.text, by_name.name) == ("T" + CHATML, "tokenizer:tool_use")


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    template = resolve_chat_template(tokenizer(tmp_path / "tokenizer"), str(file))
    assert template is not None
    assert (template.text, template.name) == (CHATML, "mine.jinja")


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError) as error:
        resolve_chat_template(tokenizer(tmp_path, chat_template=CHATML), "tulo")
    assert error.value.found == "--chat-template tulo is neither a file nor a known name"
    assert error.value.expected == "a file, or one of tulu, tulu-bos, olmo-thinker, default"


@pytest.mark.parametrize(
    ("choice", "missing"), [("tulu", "eos_token"), ("tulu-bos", "bos_token"), ("tulu-bos", "eos_token")]
)
def test_a_template_whose_token_the_tokenizer_lacks_is_refused(tmp_path: Path, choice: str, missing: str) -> None:
    with pytest.raises(DpoCacheError, match=f"{choice} writes {missing}, and the tokenizer has none"):
        resolve_chat_template(tokenizer(tmp_path, **{missing: None}), choice)


def test_the_date_in_a_template_does_not_move_with_the_clock(tmp_path: Path) -> None:
    dated, literal = tmp_path / "dated.jinja", tmp_path / "literal.jinja"
    beginning = "\n  {% set today = TODAY %}\n  {% if today %}\n {{ today }}\n\n  {% endif %}\n"
    dated.write_text(beginning.replace("TODAY", "strftime_now('%d %b %Y, %Y-%m-%d, %A')") + CHATML)
    literal.write_text(beginning.replace("TODAY", "'26 Jul 2024, 2024-07-26, Friday'") + CHATML)
    renderings = [
        render(tmp_path / "tokenizer", str(file), [{"role": "user", "content": "Hi"}]) for file in (dated, literal)
    ]
    assert renderings[0] == renderings[1]


def test_a_file_below_the_home_folder_is_found_where_no_shell_has_looked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    template = resolve_chat_template(tokenizer(tmp_path / "tokenizer"), "~/mine.jinja")
    assert template is not None
    assert template.name == "mine.jinja"

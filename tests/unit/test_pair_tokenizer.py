"""Exact ids and masks, worked out by hand: an ASCII character's id is its code, see byte_tokenizer_factory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer_factory import BOS, CHATML, EOS, IM_END, TWO_NEWLINES, ids, marked, write_byte_tokenizer
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.pair_tokenizer import PairTokenizer
from dpo_cache.pipeline.data.preference import Message, Preference
from dpo_cache.pipeline.data.tokenization_settings import TokenizationSettings
from dpo_cache.pipeline.data.unusable_row import UnusableRow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MakeTokenizer = Callable[..., PairTokenizer]

ONE_TURN_PROMPT = "<|user|>\nHi\n<|assistant|>\n"
MULTI_TURN: list[Message] = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture
def make(tmp_path: Path) -> MakeTokenizer:
    """A pair tokenizer; the arguments are those of the settings and of the tokenizer's files."""

    def make_tokenizer(template: str | None = "tulu", **arguments: Any) -> PairTokenizer:
        of_settings = {"max_seq_length", "truncation", "mask"}
        files = {name: value for name, value in arguments.items() if name not in of_settings}
        settings_ = {name: value for name, value in arguments.items() if name in of_settings}
        folder = write_byte_tokenizer(tmp_path / "tokenizer", **files)
        return PairTokenizer(TokenizationSettings(tokenizer=folder, chat_template=template, **settings_))

    return make_tokenizer


def chat(prompt: str | list[Message], chosen: str, rejected: str, **columns: Any) -> Preference:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Preference(
        prompt=messages,
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **columns,
    )


def says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


SEARCHED: list[Message] = [says("assistant", "Search"), says("user", "Found"), says("assistant", "Yes")]
GUESSED: list[Message] = [says("assistant", "No")]


def text(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def reason(tokenizer: PairTokenizer, preference: Preference) -> str:
    with pytest.raises(UnusableRow) as unusable:
        tokenizer.tokenize(preference)
    return unusable.value.reason


# ---- rendering and boundary ----


def test_the_header_belongs_to_the_prompt_and_eos_to_the_answer(make: MakeTokenizer) -> None:
    pair = make().tokenize(chat("Hi", "Yes", "No"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT)
    assert pair.chosen_ids.tolist() == [*ids("Yes"), EOS]
    assert pair.rejected_ids.tolist() == [*ids("No"), EOS]
    assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == pair.rejected_ids.dtype == np.int32
    assert pair.scored_mask is None
    assert (pair.chosen_tokens, pair.rejected_tokens) == (4, 3)


def test_eos_is_scored_where_pad_is_the_same_token(make: MakeTokenizer) -> None:
    pair = make(pad_token="</s>").tokenize(chat("Hi", "Yes", "No"))
    assert marked(pair, "chosen") == f"{ONE_TURN_PROMPT}⟦Yes</s>⟧"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_with_bos_writes_exactly_one(make: MakeTokenizer, adds_bos: bool) -> None:
    pair = make("tulu-bos", adds_bos=adds_bos).tokenize(chat("Hi", "Yes", "No"))
    assert pair.prompt_ids.tolist() == [BOS, *ids(ONE_TURN_PROMPT)]


def test_a_template_without_bos_gets_none_from_the_tokenizer(make: MakeTokenizer) -> None:
    pair = make("tulu", adds_bos=True).tokenize(chat("Hi", "Yes", "No"))
    assert BOS not in pair.prompt_ids


def test_what_the_template_writes_behind_the_last_eos_is_part_of_the_answer(make: MakeTokenizer) -> None:
    pair = make(None, chat_template=CHATML, eos_token="<|im_end|>").tokenize(chat("Hi", "Yes", "No"))
    assert pair.chosen_ids.tolist() == [*ids("Yes"), IM_END, *ids("\n")]
    assert marked(pair, "rejected") == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦No<|im_end|>\n⟧")


def test_a_newline_that_merges_with_the_header_is_scored_on_both_sides(make: MakeTokenizer) -> None:
    pair = make(merges_newlines=True).tokenize(chat("Hi", "\nYes", "\nNo"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT[:-1])
    assert pair.chosen_ids.tolist() == [TWO_NEWLINES, *ids("Yes"), EOS]
    assert pair.rejected_ids.tolist() == [TWO_NEWLINES, *ids("No"), EOS]


def test_a_newline_that_merges_on_one_side_only_makes_the_row_unusable(make: MakeTokenizer) -> None:
    assert reason(make(merges_newlines=True), chat("Hi", "\nYes", "No")) == "boundary-differs"


def test_answers_may_begin_alike(make: MakeTokenizer) -> None:
    pair = make().tokenize(chat("Hi", "I see", "I do"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT)


def test_answers_that_render_alike_are_identical(make: MakeTokenizer) -> None:
    stripping = CHATML.replace("message['content']", "message['content'] | trim")
    with pytest.raises(UnusableRow, match=r"identical-responses: .* \(the template .* leaves out what differs\)"):
        make(None, chat_template=stripping).tokenize(chat("Hi", "Yes", "Yes "))


HEADERS = (
    "{%- for message in messages -%}"
    "{{- bos_token if loop.first -}}"
    "{{- '[' + message['role'] + ']\n\n' + message['content'] | trim + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{{- '[assistant]\n\n' if add_generation_prompt -}}"
)
"""In the style of Llama-3: a header for each role, the same end behind each message, whose text is stripped."""
RENAMED_ROLE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{- '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>model\n' if add_generation_prompt -}}"
)
"""In the style of Gemma: the assistant under another name, no system role, a newline behind each message's end."""
INSTRUCTION = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- else -%}{{ 'SPACE' + message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""In the style of Mistral: no header before a response, so no generation prompt; eos behind responses only."""


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (
            HEADERS,
            "<s>[user]\n\nHi<|im_end|>[assistant]\n\n⟦Hello there<|im_end|>⟧"
            "[user]\n\nBye<|im_end|>[assistant]\n\n⟦ANSWER<|im_end|>⟧",
        ),
        (
            RENAMED_ROLE,
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>model\n⟦Hello there<|im_end|>\n⟧"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>model\n⟦ANSWER<|im_end|>\n⟧",
        ),
        (INSTRUCTION.replace("SPACE", ""), "<s>[INST] Hi [/INST]⟦Hello there</s>⟧[INST] Bye [/INST]⟦ANSWER</s>⟧"),
        (INSTRUCTION.replace("SPACE", " "), "<s>[INST] Hi [/INST]⟦ Hello there</s>⟧[INST] Bye [/INST]⟦ ANSWER</s>⟧"),
    ],
)
def test_templates_of_other_families_get_one_bos_and_a_mask_of_whole_responses(
    make: MakeTokenizer, template: str, rendered: str, adds_bos: bool
) -> None:
    last_turn = rendered.replace("⟦", "", 1).replace("⟧", "", 1)
    for mask, expected in (("all-turns", rendered), ("last-turn", last_turn)):
        tokenizer = make(None, chat_template=template, adds_bos=adds_bos, mask=mask)
        pair = tokenizer.tokenize(chat(MULTI_TURN[1:], "Goodbye now", "No"))
        assert marked(pair, "chosen") == expected.replace("ANSWER", "Goodbye now")
        assert marked(pair, "rejected") == expected.replace("ANSWER", "No")


# ---- masks ----


def test_last_turn_scores_the_last_answer_only(make: MakeTokenizer) -> None:
    pair = make().tokenize(chat(MULTI_TURN, "Goodbye now", "No"))
    assert pair.scored_mask is None
    assert marked(pair, "chosen") == (
        "<|system|>\nBe kind\n<|user|>\nHi\n<|assistant|>\nHello there</s>\n<|user|>\nBye\n<|assistant|>\n"
        "⟦Goodbye now</s>⟧"
    )


def test_all_turns_scores_every_answer_but_no_header_and_no_newline_after_eos(make: MakeTokenizer) -> None:
    pair = make(mask="all-turns").tokenize(chat(MULTI_TURN, "Goodbye now", "No"))
    beginning = "<|system|>\nBe kind\n<|user|>\nHi\n<|assistant|>\n⟦Hello there</s>⟧\n<|user|>\nBye\n<|assistant|>\n"
    assert marked(pair, "chosen") == f"{beginning}⟦Goodbye now</s>⟧"
    assert marked(pair, "rejected") == f"{beginning}⟦No</s>⟧"
    assert pair.scored_mask is not None
    assert len(pair.scored_mask) == pair.shared_prefix_tokens
    assert (pair.chosen_tokens, pair.rejected_tokens) == (12 + 12, 12 + 3)


def test_all_turns_of_one_turn_is_the_default_mask(make: MakeTokenizer) -> None:
    assert make(mask="all-turns").tokenize(chat("Hi", "Yes", "No")).scored_mask is None


def test_all_turns_scores_the_newline_that_chatml_writes_behind_each_answer(make: MakeTokenizer) -> None:
    tokenizer = make(None, chat_template=CHATML, eos_token="<|im_end|>", mask="all-turns")
    pair = tokenizer.tokenize(chat(MULTI_TURN[1:], "Ciao", "No"))
    assert marked(pair, "chosen") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello there<|im_end|>\n⟧"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦Ciao<|im_end|>\n⟧"
    )


def test_two_answers_in_a_row_are_each_scored_behind_their_header(make: MakeTokenizer) -> None:
    prompt: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pair = make(mask="all-turns").tokenize(chat(prompt, "Well", "So"))
    assert marked(pair, "chosen") == "<|user|>\nHi\n<|assistant|>\n⟦Hello</s>⟧\n<|assistant|>\n⟦Well</s>⟧"


def test_the_very_first_token_is_never_scored(make: MakeTokenizer) -> None:
    prompt: list[Message] = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]
    pair = make(mask="all-turns").tokenize(chat(prompt, "Well", "So"))
    assert not pair.prompt_scored[0]
    assert pair.prompt_scored[1]


@pytest.mark.parametrize("mask", ["response-turns", "all-turns"])
def test_of_several_messages_all_that_the_assistant_says_is_scored(make: MakeTokenizer, mask: str) -> None:
    preference = Preference(prompt=MULTI_TURN, chosen=SEARCHED, rejected=GUESSED)
    pair = make(mask=mask).tokenize(preference)
    hello = "⟦Hello there</s>⟧" if mask == "all-turns" else "Hello there</s>"
    prompt = f"<|system|>\nBe kind\n<|user|>\nHi\n<|assistant|>\n{hello}\n<|user|>\nBye\n<|assistant|>\n"
    assert marked(pair, "chosen") == f"{prompt}⟦Search</s>⟧\n<|user|>\nFound\n<|assistant|>\n⟦Yes</s>⟧"
    assert marked(pair, "rejected") == f"{prompt}⟦No</s>⟧"


@pytest.mark.parametrize("mask", ["last-turn", "open-instruct-last-turn"])
def test_a_mask_of_the_last_turn_takes_no_response_of_several_messages(make: MakeTokenizer, mask: str) -> None:
    for chosen, rejected in ((SEARCHED, GUESSED), (GUESSED, SEARCHED)):
        preference = Preference(prompt=MULTI_TURN, chosen=chosen, rejected=rejected)
        assert reason(make(mask=mask), preference) == "several-messages"


def test_response_turns_of_single_messages_are_the_default_mask(make: MakeTokenizer) -> None:
    assert make(mask="response-turns").tokenize(chat(MULTI_TURN, "Yes", "No")).scored_mask is None


def test_a_response_may_be_the_beginning_of_the_other(make: MakeTokenizer) -> None:
    preference = Preference(prompt=MULTI_TURN[1:2], chosen=SEARCHED[:1], rejected=SEARCHED)
    pair = make(mask="response-turns").tokenize(preference)
    assert marked(pair, "chosen") == f"{ONE_TURN_PROMPT}⟦Search</s>⟧"
    assert marked(pair, "rejected").startswith(f"{ONE_TURN_PROMPT}⟦Search</s>⟧\n<|user|>")


def test_the_turn_of_a_response_that_its_template_rewrites_makes_the_row_unusable(make: MakeTokenizer) -> None:
    thinking = [says("assistant", "<think>a</think>Search"), *SEARCHED[1:]]
    preference = Preference(prompt=THOUGHTFUL[:1], chosen=thinking, rejected=GUESSED)
    assert reason(make(None, chat_template=THINKING, mask="response-turns"), preference) == "template-rewrites-history"


def masks_by_prefix_counts(
    tokenizer: Any, template: str, messages: list[Message], *, all_turns: bool = True
) -> list[bool]:
    """The published rules, written a second time: every message that is no assistant's (every message but the last)
    is masked, from the length of the rendering before it to the length of the rendering through it, the header
    included where an answer follows."""

    def length(count: int, add_generation_prompt: bool) -> int:
        rendered = tokenizer.apply_chat_template(
            messages[:count], chat_template=template, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        return len(rendered)

    scored = [True] * length(len(messages), False)
    for i, message in enumerate(messages):
        if message["role"] == "assistant" if all_turns else i == len(messages) - 1:
            continue
        answer_follows = i + 1 < len(messages) and messages[i + 1]["role"] == "assistant"
        start, end = 0 if i == 0 else length(i, False), length(i + 1, answer_follows)
        scored[start:end] = [False] * (end - start)
    return scored


@given(
    turns=st.lists(st.tuples(st.text("ab ", min_size=1), st.text("cd\n", min_size=1)), max_size=4),
    more=st.lists(st.tuples(st.text("ab ", min_size=1), st.text("cd\n", min_size=1)), max_size=2),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_turns_equals_the_published_rule(
    make: MakeTokenizer, turns: list[tuple[str, str]], more: list[tuple[str, str]]
) -> None:
    tokenizer = make(mask="all-turns")
    messages: list[Message] = [{"role": "system", "content": "s"}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    preference = chat([*messages, {"role": "user", "content": "last"}], "good", "bad")
    assert isinstance(preference.rejected, list)
    for question, answer in more:
        preference.rejected.extend([says("user", question), says("assistant", answer)])
    pair = tokenizer.tokenize(preference)
    assert tokenizer.chat_template is not None
    assert isinstance(preference.prompt, list)
    for messages_, side in ((preference.chosen, pair.chosen_scored), (preference.rejected, pair.rejected_scored)):
        assert isinstance(messages_, list)
        expected = masks_by_prefix_counts(
            tokenizer.tokenizer, tokenizer.chat_template.text, preference.prompt + messages_
        )
        assert [*pair.prompt_scored.tolist(), *side.tolist()] == expected


@pytest.mark.parametrize("turns_scored", ["all-turns", "last-turn"])
@given(
    turns=st.lists(st.tuples(st.text("ab ", min_size=1), st.text("\nc", min_size=1)), max_size=3),
    answers=st.tuples(st.text("\ng", min_size=1), st.text("\nb", min_size=1)),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_open_instruct_masks_equal_the_published_rules_where_tokens_merge(
    make: MakeTokenizer, turns_scored: str, turns: list[tuple[str, str]], answers: tuple[str, str]
) -> None:
    tokenizer = make(mask=f"open-instruct-{turns_scored}", merges_newlines=True)
    messages: list[Message] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    preference = chat([*messages, {"role": "user", "content": "last"}], *answers)
    (pair,) = tokenizer.tokenize_batch([preference])
    if isinstance(pair, UnusableRow):
        assert pair.reason == "identical-responses"
        return
    assert tokenizer.chat_template is not None
    assert isinstance(preference.prompt, list)
    for messages_, side in ((preference.chosen, pair.chosen_scored), (preference.rejected, pair.rejected_scored)):
        assert isinstance(messages_, list)
        expected = masks_by_prefix_counts(
            tokenizer.tokenizer,
            tokenizer.chat_template.text,
            preference.prompt + messages_,
            all_turns=turns_scored == "all-turns",
        )
        assert [*pair.prompt_scored.tolist(), *side.tolist()] == expected


@pytest.mark.parametrize("turns_scored", ["all-turns", "last-turn"])
def test_where_nothing_merges_the_open_instruct_masks_are_the_plain_ones(
    make: MakeTokenizer, turns_scored: str
) -> None:
    preference = chat(MULTI_TURN, "Goodbye now", "No")
    plain = make(mask=turns_scored).tokenize(preference)
    counted = make(mask=f"open-instruct-{turns_scored}").tokenize(preference)
    for side in ("chosen", "rejected"):
        assert marked(counted, side) == marked(plain, side)
    assert (counted.scored_mask is None) == (turns_scored == "last-turn")


@pytest.mark.parametrize("turns_scored", ["all-turns", "last-turn"])
def test_open_instruct_counts_a_newline_that_merges_with_the_header_to_the_prompt(
    make: MakeTokenizer, turns_scored: str
) -> None:
    pair = make(mask=f"open-instruct-{turns_scored}", merges_newlines=True).tokenize(chat("Hi", "\nYes", "No"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT[:-1])
    assert pair.chosen_ids.tolist() == [TWO_NEWLINES, *ids("Yes"), EOS]
    assert marked(pair, "chosen") == f"{ONE_TURN_PROMPT[:-1]}\n\n⟦Yes</s>⟧"
    assert marked(pair, "rejected") == f"{ONE_TURN_PROMPT}⟦No</s>⟧"


def test_the_open_instruct_masks_leave_plain_text_alone(make: MakeTokenizer) -> None:
    pair = make(None, mask="open-instruct-last-turn", merges_newlines=True).tokenize(text("Hi\n", "\nYes", "\nNo"))
    assert marked(pair, "chosen") == "Hi⟦\n\nYes</s>⟧"


def test_a_merged_token_stays_unscored_when_the_answer_is_cut(make: MakeTokenizer) -> None:
    tokenizer = fitted(
        make, "truncate-response-right", PROMPT_TOKENS + 2, mask="open-instruct-last-turn", merges_newlines=True
    )
    pair = tokenizer.tokenize(chat("Hi", "\nYes", "No"))
    assert marked(pair, "chosen") == f"{ONE_TURN_PROMPT[:-1]}\n\n⟦Ye⟧"
    assert marked(pair, "rejected") == f"{ONE_TURN_PROMPT}⟦No⟧"


# ---- templates with a mind of their own ----

THINKING = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and not loop.last -%}"
    "{%- set content = content.split('</think>')[-1] -%}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking | default(true) -%}{{ '<think>' }}{%- endif -%}{%- endif -%}"
)
THOUGHTFUL: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>Hm</think>Hello"},
    {"role": "user", "content": "Bye"},
]


def test_the_last_turn_is_found_although_past_thoughts_are_rewritten(make: MakeTokenizer) -> None:
    pair = make(None, chat_template=THINKING).tokenize(chat(THOUGHTFUL, "<think>a</think>A", "<think>b</think>B"))
    assert marked(pair, "chosen") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n<think>⟦a</think>A<|im_end|>\n⟧"
    )


def test_an_opened_thought_that_no_answer_has_stays_out_of_the_prompt(make: MakeTokenizer) -> None:
    pair = make(None, chat_template=THINKING).tokenize(chat("Hi", "Yes", "No"))
    assert marked(pair, "chosen") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧"


@pytest.mark.parametrize("mask", ["last-turn", "all-turns"])
def test_a_thought_that_only_one_answer_has_is_scored_as_beside_an_answer_of_its_own_kind(
    make: MakeTokenizer, mask: str
) -> None:
    tokenizer = make(None, chat_template=THINKING, mask=mask)
    thought, plain = "<think>a</think>A", "Certainly not"
    mixed, swapped, both, neither = (
        tokenizer.tokenize(chat("Hi", *answers))
        for answers in ((thought, plain), (plain, thought), (thought, "<think>b</think>B"), (plain, "No"))
    )
    assert marked(mixed, "chosen") == marked(swapped, "rejected") == marked(both, "chosen")
    assert marked(mixed, "rejected") == marked(swapped, "chosen") == marked(neither, "chosen")
    assert marked(mixed, "chosen").endswith("assistant\n<think>⟦a</think>A<|im_end|>\n⟧")
    assert marked(mixed, "rejected").endswith("assistant\n⟦Certainly not<|im_end|>\n⟧")
    assert mixed.prompt_ids.tolist() == neither.prompt_ids.tolist()
    opening = len(ids("<think>"))
    assert not mixed.chosen_scored[:opening].any()
    assert mixed.chosen_scored[opening:].all()


def test_a_thought_that_is_cut_off_leaves_nothing_to_score(make: MakeTokenizer) -> None:
    header = len(make(None, chat_template=THINKING).tokenize(chat("Hi", "Yes", "No")).prompt_ids)
    tokenizer = fitted(make, "truncate-response-right", header + 7, template=None, chat_template=THINKING)
    assert reason(tokenizer, chat("Hi", "<think>a</think>A", "Certainly not")) == "nothing-scored"


def test_open_instruct_counts_an_opened_thought_to_the_prompt_whether_or_not_the_answer_has_one(
    make: MakeTokenizer,
) -> None:
    tokenizer = make("olmo-thinker", eos_token="<|im_end|>", mask="open-instruct-last-turn")
    system: list[Message] = [{"role": "system", "content": "S"}]
    pair = tokenizer.tokenize(chat([*system, *THOUGHTFUL], "<think>a</think>A", "Certainly not"))
    before = (
        "<|im_start|>system\nS You do not currently have access to any functions. <functions></functions><|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>Hm</think>Hello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert marked(pair, "chosen") == f"{before}<think>⟦a</think>A<|im_end|>⟧"
    # `<think>` is seven tokens here, so the first seven of the other answer go unscored
    assert marked(pair, "rejected") == f"{before}Certain⟦ly not<|im_end|>⟧"
    assert reason(tokenizer, chat("Hi", "<think>a", "No")) == "nothing-scored"


def test_all_turns_refuses_answers_that_the_template_rewrites(make: MakeTokenizer) -> None:
    tokenizer = make(None, chat_template=THINKING, mask="all-turns")
    assert reason(tokenizer, chat(THOUGHTFUL, "A", "B")) == "template-rewrites-history"


def test_a_prompt_that_changes_once_an_answer_follows_is_refused(make: MakeTokenizer) -> None:
    template = CHATML.replace("message['role']", "(messages | length) ~ message['role']")
    assert reason(make(None, chat_template=template), chat("Hi", "Yes", "No")) == "template-rewrites-prompt"


def test_a_role_that_the_template_refuses_makes_the_row_unusable(make: MakeTokenizer) -> None:
    prompt: list[Message] = [{"role": "tool", "content": "42"}]
    with pytest.raises(UnusableRow, match=r"template-refused: .* \(the tulu format has no role tool\)"):
        make().tokenize(chat(prompt, "Yes", "No"))


def test_chat_template_kwargs_reach_the_template(make: MakeTokenizer) -> None:
    tokenizer = make(None, chat_template=THINKING)
    preference = chat("Hi", "<think>a", "<think>b", chat_template_kwargs={"enable_thinking": False})
    assert marked(tokenizer.tokenize(preference), "chosen").endswith("assistant\n⟦<think>a<|im_end|>\n⟧")


def test_tools_reach_the_template(make: MakeTokenizer) -> None:
    template = "{%- if tools -%}{{ tools | map(attribute='name') | join(',') + ';' }}{%- endif -%}" + CHATML
    preference = chat("Hi", "Yes", "No", tools=[{"name": "add"}, {"name": "sum"}])
    pair = make(None, chat_template=template).tokenize(preference)
    assert marked(pair, "chosen").startswith("add,sum;<|im_start|>user")


@pytest.mark.parametrize("content", [{"content": ""}, {}])
def test_a_call_of_a_tool_that_the_template_leaves_out_is_an_empty_response(
    make: MakeTokenizer, content: dict[str, str]
) -> None:
    call: Message = {"role": "assistant", **content, "tool_calls": [{"name": "add"}]}
    preference = replace(chat("Hi", "Yes", "No"), chosen=[call])
    silent = CHATML.replace("message['content']", "(message['content'] or '')")
    with pytest.raises(UnusableRow, match=r"empty-response: .* \(chosen: the template leaves out tool_calls\)"):
        make(None, chat_template=silent).tokenize(preference)
    several = replace(preference, chosen=[call, says("user", "Found"), says("assistant", "Yes")])
    assert reason(make(None, chat_template=silent, mask="response-turns"), several) == "empty-response"
    calling = silent.replace(" or '')", " or message.tool_calls[0].name)")
    pair = make(None, chat_template=calling).tokenize(preference)
    assert marked(pair, "chosen").endswith("assistant\n⟦add<|im_end|>\n⟧")


def test_all_turns_refuse_an_earlier_turn_of_which_the_template_would_leave_the_end_alone(
    make: MakeTokenizer,
) -> None:
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    preference = chat([says("user", "1+1?"), call, says("tool", "2")], "Yes", "No")
    with pytest.raises(UnusableRow, match=r"empty-response: .* \(message 2: the template leaves out tool_calls\)"):
        make(None, chat_template=CHATML, mask="all-turns").tokenize(preference)
    pair = make(None, chat_template=CHATML).tokenize(preference)  # unscored, and what the model reads at inference too
    assert "<|im_start|>assistant\n<|im_end|>\n" in marked(pair, "chosen")


def test_rows_with_tools_take_the_tokenizers_template_for_them_as_transformers_does(make: MakeTokenizer) -> None:
    several = {"default": CHATML, "tool_use": "{{ tools | map(attribute='name') | join(',') + ';' }}" + CHATML}
    tokenizer = make(None, chat_template=several)
    with_tools = chat("Hi", "Yes", "No", tools=[{"name": "add"}])
    assert marked(tokenizer.tokenize(with_tools), "chosen").startswith("add;<|im_start|>user")
    assert marked(tokenizer.tokenize(chat("Hi", "Yes", "No")), "chosen").startswith("<|im_start|>user")
    rendered = tokenizer.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
        tools=with_tools.tools,
        return_dict=False,
    )
    pair = tokenizer.tokenize(with_tools)
    assert [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()] == rendered
    assert tokenizer.description()["tool_chat_template"]["name"] == "tokenizer:tool_use"


def test_a_template_chosen_by_name_renders_rows_with_tools_too(make: MakeTokenizer) -> None:
    several = {"default": CHATML, "tool_use": "{{ tools | map(attribute='name') | join(',') + ';' }}" + CHATML}
    tokenizer = make("default", chat_template=several)
    with_tools = chat("Hi", "Yes", "No", tools=[{"name": "add"}])
    assert marked(tokenizer.tokenize(with_tools), "chosen").startswith("<|im_start|>user")
    assert tokenizer.description()["tool_chat_template"] is None


def test_half_a_character_makes_the_row_unusable_wherever_json_brought_it(make: MakeTokenizer) -> None:
    template = "{%- if tools -%}{{ tools[0].name }}{%- endif -%}" + CHATML
    tokenizer = make(None, chat_template=template)
    assert reason(tokenizer, chat("Hi", "Yes", "No", tools=[{"name": "add \ud83d"}])) == "lone-surrogate"
    assert reason(tokenizer, text("Hi", " Yes \ud83d", " No")) == "lone-surrogate"


def test_values_that_nest_too_deeply_make_the_row_unusable(make: MakeTokenizer) -> None:
    template = "{%- if tools -%}{{ tools | tojson }}{%- endif -%}" + CHATML
    deep: Any = []
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(UnusableRow, match=r"template-refused: .* nest too deeply"):
        make(None, chat_template=template).tokenize(chat("Hi", "Yes", "No", tools=[{"deep": deep}]))


def test_messages_without_any_template_are_refused_by_name(make: MakeTokenizer) -> None:
    with pytest.raises(DpoCacheError, match="has no chat template"):
        make(None).tokenize(chat("Hi", "Yes", "No"))


# ---- doubled special tokens ----


@pytest.mark.parametrize(
    ("template", "name"),
    [("{{ bos_token + bos_token }}" + CHATML, "bos"), (CHATML.replace("<|im_end|>", "</s></s>"), "eos")],
)
def test_a_template_that_doubles_a_special_token_is_an_error(make: MakeTokenizer, template: str, name: str) -> None:
    with pytest.raises(DpoCacheError, match=f"two {name} tokens"):
        make(None, chat_template=template)


def test_an_eos_in_the_answers_own_text_makes_the_row_unusable(make: MakeTokenizer) -> None:
    tokenizer = make()
    assert reason(tokenizer, chat("Hi", "Yes", "No</s>")) == "double-eos"
    assert reason(tokenizer, text("Hi", " Yes</s></s>", " No")) == "double-eos"


def test_plain_text_that_ends_with_an_eos_gets_no_second_one(make: MakeTokenizer) -> None:
    tokenizer = make()
    for chosen, rejected in ((" Yes", " No"), (" Yes</s>", " No</s>"), (" Yes</s>", " No")):
        pair = tokenizer.tokenize(text("Hi", chosen, rejected))
        assert pair.chosen_ids.tolist() == [*ids(" Yes"), EOS]
        assert pair.rejected_ids.tolist() == [*ids(" No"), EOS]
        assert pair.scored_mask is None


def test_an_eos_inside_an_answer_is_no_doubled_one(make: MakeTokenizer) -> None:
    pair = make().tokenize(chat("Hi", "a</s></s>b", "No"))
    assert pair.chosen_ids.tolist() == [*ids("a"), EOS, EOS, *ids("b"), EOS]


def test_a_bos_in_plain_text_makes_the_row_unusable(make: MakeTokenizer) -> None:
    for written in (text("<s>Hi", " Yes", " No"), text("", "<s>Yes", "No")):
        assert reason(make(adds_bos=True), written) == "double-bos"


# ---- plain text ----


@pytest.mark.parametrize(("adds_bos", "beginning"), [(False, []), (True, [BOS])])
def test_plain_text_gets_the_tokenizers_bos_once_and_eos_behind_each_answer(
    make: MakeTokenizer, adds_bos: bool, beginning: list[int]
) -> None:
    pair = make(None, adds_bos=adds_bos, pad_token="</s>").tokenize(text("Hi:", " Yes", " No"))
    assert pair.prompt_ids.tolist() == [*beginning, *ids("Hi:")]
    assert pair.chosen_ids.tolist() == [*ids(" Yes"), EOS]
    assert pair.rejected_ids.tolist() == [*ids(" No"), EOS]
    assert pair.scored_mask is None


def test_plain_text_finds_its_boundary_in_the_joint_tokens(make: MakeTokenizer) -> None:
    pair = make(merges_newlines=True).tokenize(text("Hi\n", "\nYes", "\nNo"))
    assert pair.prompt_ids.tolist() == ids("Hi")
    assert pair.chosen_ids.tolist() == [TWO_NEWLINES, *ids("Yes"), EOS]


def test_plain_text_needs_an_eos(make: MakeTokenizer) -> None:
    with pytest.raises(DpoCacheError, match="has no eos"):
        make(None, eos_token=None).tokenize(text("Hi", " Yes", " No"))


def test_plain_text_without_prompt_needs_a_bos(make: MakeTokenizer) -> None:
    assert reason(make(), text("", "Yes", "No")) == "no-prompt"
    assert make(adds_bos=True).tokenize(text("", "Yes", "No")).prompt_ids.tolist() == [BOS]


# ---- truncation ----

PROMPT_TOKENS = len(ONE_TURN_PROMPT)  # 26; the answers are "Absolutely" with eos (11 tokens) and "No" with eos (3)


def fitted(make: MakeTokenizer, truncation: str, length: int, **arguments: Any) -> PairTokenizer:
    return make(truncation=truncation, max_seq_length=length, **arguments)


@pytest.mark.parametrize("truncation", ["drop", "truncate-prompt-left", "truncate-response-right"])
def test_a_pair_that_just_fits_is_left_alone(make: MakeTokenizer, truncation: str) -> None:
    tokenizer = fitted(make, truncation, PROMPT_TOKENS + 11)
    pair = tokenizer.tokenize(chat("Hi", "Absolutely", "No"))
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (PROMPT_TOKENS, 11, 3)
    assert not tokenizer.truncated


def test_drop_cuts_nothing(make: MakeTokenizer) -> None:
    tokenizer = fitted(make, "drop", PROMPT_TOKENS + 10)
    assert reason(tokenizer, chat("Hi", "No", "Absolutely")) == "too-long"
    assert not tokenizer.truncated


def test_truncate_prompt_left_keeps_answers_whole(make: MakeTokenizer) -> None:
    tokenizer = fitted(make, "truncate-prompt-left", 20)
    pair = tokenizer.tokenize(chat("Hi", "Absolutely", "No"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT[-9:])
    assert pair.chosen_ids.tolist() == [*ids("Absolutely"), EOS]
    assert pair.rejected_ids.tolist() == [*ids("No"), EOS]
    assert tokenizer.truncated == {"prompt": 1}


def test_truncate_prompt_left_keeps_a_leading_bos(make: MakeTokenizer) -> None:
    pair = fitted(make, "truncate-prompt-left", 20, template="tulu-bos").tokenize(chat("Hi", "Absolutely", "No"))
    assert pair.prompt_ids.tolist() == [BOS, *ids(ONE_TURN_PROMPT[-8:])]


def test_truncate_prompt_left_cuts_the_mask_with_the_prompt(make: MakeTokenizer) -> None:
    tail = "llo there</s>\n<|user|>\nBye\n<|assistant|>\n"
    num_tokens = len(tail) - len("</s>") + 1
    tokenizer = fitted(make, "truncate-prompt-left", num_tokens + 12, mask="all-turns")
    pair = tokenizer.tokenize(chat(MULTI_TURN, "Goodbye now", "No"))
    assert marked(pair, "chosen") == "l⟦lo there</s>⟧\n<|user|>\nBye\n<|assistant|>\n⟦Goodbye now</s>⟧"


def test_truncate_prompt_left_refuses_an_answer_that_fills_the_length(make: MakeTokenizer) -> None:
    assert reason(fitted(make, "truncate-prompt-left", 11), chat("Hi", "Absolutely", "No")) == "response-too-long"


def test_truncate_response_right_cuts_each_answer_and_its_eos(make: MakeTokenizer) -> None:
    tokenizer = fitted(make, "truncate-response-right", PROMPT_TOKENS + 4)
    pair = tokenizer.tokenize(chat("Hi", "Absolutely", "No"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT)
    assert pair.chosen_ids.tolist() == ids("Abso")
    assert pair.rejected_ids.tolist() == [*ids("No"), EOS]
    assert tokenizer.truncated == {"chosen": 1, "rejected": 0, "either": 1}
    tokenizer.tokenize(chat("Hi", "Absolutely", "Certainly"))
    assert tokenizer.truncated == {"chosen": 2, "rejected": 1, "either": 2}


@pytest.mark.parametrize(
    ("truncation", "length", "answers"),
    [
        ("truncate-prompt-left", 11, ("Absolutely", "No")),
        ("truncate-response-right", PROMPT_TOKENS, ("Absolutely", "No")),
        ("truncate-response-right", PROMPT_TOKENS + 4, ("Absolutely", "Absolute")),
    ],
)
def test_a_row_that_makes_no_pair_is_not_counted_as_cut(
    make: MakeTokenizer, truncation: str, length: int, answers: tuple[str, str]
) -> None:
    tokenizer = fitted(make, truncation, length)
    reason(tokenizer, chat("Hi", *answers))
    assert not tokenizer.truncated


def test_truncate_response_right_keeps_the_mask_of_earlier_turns(make: MakeTokenizer) -> None:
    whole = make(mask="all-turns").tokenize(chat(MULTI_TURN, "Goodbye now", "No"))
    tokenizer = fitted(make, "truncate-response-right", len(whole.prompt_ids) + 4, mask="all-turns")
    pair = tokenizer.tokenize(chat(MULTI_TURN, "Goodbye now", "No"))
    assert marked(pair, "chosen").endswith("⟦Hello there</s>⟧\n<|user|>\nBye\n<|assistant|>\n⟦Good⟧")


def test_truncate_response_right_refuses_what_it_made_alike_or_empty(make: MakeTokenizer) -> None:
    tokenizer = fitted(make, "truncate-response-right", PROMPT_TOKENS + 2)
    assert reason(tokenizer, chat("Hi", "No way", "No")) == "identical-after-truncation"
    tokenizer = fitted(make, "truncate-response-right", PROMPT_TOKENS)
    assert reason(tokenizer, chat("Hi", "Yes", "No")) == "prompt-too-long"


@given(
    length=st.integers(min_value=2, max_value=80),
    truncation=st.sampled_from(["drop", "truncate-prompt-left", "truncate-response-right"]),
    mask=st.sampled_from(["last-turn", "response-turns", "all-turns"]),
    answers=st.tuples(st.text("ab", min_size=1, max_size=40), st.text("ab", min_size=1, max_size=40)),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_pair_is_ever_too_long_empty_alike_or_without_anything_scored(
    make: MakeTokenizer, length: int, truncation: str, mask: str, answers: tuple[str, str]
) -> None:
    tokenizer = fitted(make, truncation, length, mask=mask)
    (result,) = tokenizer.tokenize_batch([chat(MULTI_TURN, *answers)])
    if isinstance(result, UnusableRow):
        return
    assert len(result.prompt_ids) + max(len(result.chosen_ids), len(result.rejected_ids)) <= length
    assert len(result.prompt_ids) >= 1
    assert result.chosen_tokens >= 1
    assert result.rejected_tokens >= 1
    assert not result.prompt_scored[0]
    assert not np.array_equal(result.chosen_ids, result.rejected_ids)


# ---- the tokenizer as a whole ----


def test_a_batch_gives_what_its_rows_give_alone(make: MakeTokenizer) -> None:
    tokenizer = make(mask="all-turns", adds_bos=True)
    preferences = [
        chat(MULTI_TURN, "A", "B"),
        chat(MULTI_TURN, "A", "A"),
        text("Hi:", " Yes", " No"),
        chat("Hi", "B", "A"),
        chat(MULTI_TURN, "C", "B"),
    ]
    results = tokenizer.tokenize_batch(preferences)
    assert isinstance(results[1], UnusableRow)
    assert results[1].reason == "identical-responses"
    for preference, result in zip(preferences, results, strict=True):
        if isinstance(result, UnusableRow):
            continue
        alone = tokenizer.tokenize(preference)
        assert marked(alone, "chosen") == marked(result, "chosen")
        assert marked(alone, "rejected") == marked(result, "rejected")


def test_a_second_tokenizer_from_the_same_settings_makes_the_same_tokens(make: MakeTokenizer) -> None:
    first = make("tulu-bos", mask="all-turns")
    second = PairTokenizer(pickle.loads(pickle.dumps(first.settings)))
    preference = chat(MULTI_TURN, "Yes", "No")
    assert marked(second.tokenize(preference), "chosen") == marked(first.tokenize(preference), "chosen")
    assert second.description() == first.description()


def test_truncation_saved_in_the_tokenizers_files_is_not_applied(make: MakeTokenizer) -> None:
    tokenizer = make()
    file = Path(tokenizer.settings.tokenizer) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    pair = PairTokenizer(tokenizer.settings).tokenize(chat("Hi", "Yes", "No"))
    assert pair.prompt_ids.tolist() == ids(ONE_TURN_PROMPT)


def test_the_description_is_json_and_names_what_makes_other_tokens(make: MakeTokenizer) -> None:
    plain = make("tulu").description()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rendered_example"] == "<|user|>\nquestion\n<|assistant|>\nanswer</s>"
    assert plain["special_tokens"]["eos_token"] == {"token": "</s>", "id": EOS}
    assert plain["settings"]["mask"] == "last-turn"
    with_bos = make("tulu-bos").description()
    assert with_bos["chat_template"]["sha256"] != plain["chat_template"]["sha256"]
    assert with_bos["vocabulary_sha256"] == plain["vocabulary_sha256"]
    merging = make("tulu", merges_newlines=True).description()
    assert merging["vocabulary_sha256"] != plain["vocabulary_sha256"]
    assert merging["tokenizer_sha256"] != plain["tokenizer_sha256"]


def test_the_description_does_not_depend_on_what_was_tokenized_before(make: MakeTokenizer) -> None:
    tokenizer = make()
    before = tokenizer.description()
    tokenizer.tokenizer(["a", "bcd"], padding=False, truncation=True, max_length=2)
    assert tokenizer.description() == before

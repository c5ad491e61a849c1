"""What a row says, or why it says nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from dpo_cache.pipeline.data.preference import Preference, read_preference
from dpo_cache.pipeline.data.preference_format import PreferenceFormat
from dpo_cache.pipeline.data.unusable_row import UnusableRow
from preference_rows import (
    CONVERSATIONS,
    EXPLICIT,
    EXPLICIT_TEXT,
    IMPLICIT,
    PLAIN_TEXT,
    TRANSCRIPT,
    TURNS,
    assistant,
    row,
    user,
)


def unusable(row_: dict[str, Any], preference_format: PreferenceFormat) -> UnusableRow:
    with pytest.raises(UnusableRow) as raised:
        read_preference(row_, preference_format)
    return raised.value


# ---- messages ----


def test_the_prompt_is_all_that_both_sides_begin_with() -> None:
    beginning = [{"role": "system", "content": "s"}, user("Hi"), assistant("Hello"), user("Well?")]
    example = row([*beginning, assistant("Yes")], [*beginning, assistant("No")])
    assert read_preference(example, IMPLICIT) == Preference(
        prompt=beginning, chosen=[assistant("Yes")], rejected=[assistant("No")]
    )


@pytest.mark.parametrize(
    "example",
    [
        row([assistant("Yes")], [assistant("No")], prompt=[user("Hi")]),
        row([assistant("Yes")], [assistant("No")], prompt="Hi"),
        row("Yes", "No", prompt=[user("Hi")]),
        {**CONVERSATIONS, "prompt": [user("Hi")]},  # the answers repeat the prompt
    ],
)
def test_explicit_prompts_make_the_same_preference_as_implied_ones(example: dict[str, Any]) -> None:
    assert read_preference(example, EXPLICIT) == read_preference(CONVERSATIONS, IMPLICIT)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([user("Hi"), assistant("Yes")], [user("Hey"), assistant("No")], "different-prompts"),
        ([user("Hi"), assistant("Yes")], [user("Hey"), assistant("Yes")], "different-prompts"),
        (
            [user("Hi"), assistant("A"), user("Why?"), assistant("Yes")],
            [user("Hi"), assistant("A"), user("How?"), assistant("No")],
            "different-prompts",
        ),
        (
            [user("Hi"), assistant("A"), assistant("Yes")],
            [user("Hi"), user("Hello?"), assistant("No")],
            "different-prompts",
        ),
        ([user("Hi"), assistant("Yes"), user("Thanks")], [user("Hi"), assistant("No")], "no-assistant-response"),
        ([user("Hi"), assistant("Yes")], [user("Hi")], "no-assistant-response"),
        ([], [user("Hi"), assistant("No")], "no-assistant-response"),
        ([assistant("Yes")], [assistant("No")], "no-prompt"),
        ([user("Hi"), assistant(" \n")], [user("Hi"), assistant("No")], "empty-response"),
        ([user("Hi"), assistant(""), user("?"), assistant("Yes")], [user("Hi"), assistant("No")], "empty-response"),
        ([user("Hi"), assistant("Yes")], [user("Hi"), {"role": "assistant", "content": None}], "empty-response"),
        ([user("Hi"), assistant("Yes")], [user("Hi"), assistant("Yes")], "identical-responses"),
        ("Yes", [user("Hi"), assistant("No")], "malformed-row"),
        (None, [user("Hi"), assistant("No")], "malformed-row"),
        ([user("Hi"), {"content": "Yes"}], [user("Hi"), assistant("No")], "malformed-row"),
        ([user("Hi"), {"role": "assistant", "content": 3}], [user("Hi"), assistant("No")], "malformed-row"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "x"}]}, assistant("Yes")],
            [user("Hi"), assistant("No")],
            "not-text",
        ),
    ],
)
def test_rows_that_make_no_pair_say_why(chosen: Any, rejected: Any, expected: str) -> None:
    assert unusable(row(chosen, rejected), IMPLICIT).reason == expected


def test_the_detail_says_where_two_prompts_part() -> None:
    example = row([user("Hi"), user("a"), assistant("Yes")], [user("Hi"), user("b"), assistant("No")])
    assert str(unusable(example, IMPLICIT)) == (
        "different-prompts: the first message in which the two sides differ is not the assistant's on both (message 2)"
    )


def test_responses_may_hold_several_messages() -> None:
    chosen = [assistant("A"), user("Why?"), assistant("Yes")]
    rejected = [assistant("B"), user("How?"), assistant("No")]
    expected = Preference(prompt=[user("Hi")], chosen=chosen, rejected=rejected)
    assert read_preference(row([user("Hi"), *chosen], [user("Hi"), *rejected]), IMPLICIT) == expected
    assert read_preference(row(chosen, rejected, prompt="Hi"), EXPLICIT) == expected


def test_a_side_that_goes_on_where_the_other_ends_keeps_its_first_answer() -> None:
    longer = [assistant("Yes"), user("And?"), assistant("No")]
    example = row([user("Hi"), assistant("Yes")], [user("Hi"), *longer])
    assert read_preference(example, IMPLICIT) == Preference(
        prompt=[user("Hi")], chosen=[assistant("Yes")], rejected=longer
    )


def test_a_call_of_a_tool_is_an_answer_without_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": None}}]}
    preference = read_preference(row([user("1+1?"), call], [user("1+1?"), assistant("3")]), IMPLICIT)
    # An empty text, not none: Qwen3's template, like many, joins it with the call.
    assert preference.chosen == [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}]


def test_nulls_that_a_table_filled_in_are_not_seen() -> None:
    filled = row(
        [{**user("Hi"), "name": None}, {**assistant("Yes"), "name": None}], [user("Hi"), assistant("No")], tools=None
    )
    assert read_preference(filled, IMPLICIT) == read_preference(CONVERSATIONS, IMPLICIT)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    example = row([{"role": "user", "content": parts}, assistant("Yes")], [user("Hi"), assistant("No")])
    assert read_preference(example, IMPLICIT) == read_preference(CONVERSATIONS, IMPLICIT)


def test_json_that_nests_too_deeply_makes_the_row_unusable() -> None:
    with pytest.raises(UnusableRow, match="tools nests JSON too deeply"):
        read_preference({**CONVERSATIONS, "tools": "[" * 100_000 + "]" * 100_000}, IMPLICIT)


@pytest.mark.parametrize("tools", [[{"name": "add", "default": None}], json.dumps([{"name": "add"}])])
def test_tools_may_be_a_list_or_json(tools: Any) -> None:
    assert read_preference({**CONVERSATIONS, "tools": tools}, IMPLICIT).tools == [{"name": "add"}]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tools: Any) -> None:
    assert read_preference({**CONVERSATIONS, "tools": tools}, IMPLICIT).tools is None


def test_chat_template_kwargs_lose_the_nulls_of_other_rows() -> None:
    example = {**CONVERSATIONS, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    assert read_preference(example, IMPLICIT).chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("column", [{"tools": "{"}, {"tools": {"name": "add"}}, {"chat_template_kwargs": [1]}])
def test_tools_and_kwargs_of_another_kind_are_malformed(column: dict[str, Any]) -> None:
    assert unusable({**CONVERSATIONS, **column}, IMPLICIT).reason == "malformed-row"


@pytest.mark.parametrize("preference_format", [IMPLICIT, EXPLICIT])
def test_reading_leaves_the_row_as_it_was(preference_format: PreferenceFormat) -> None:
    example = {**CONVERSATIONS, "prompt": [user("Hi")], "tools": [{"name": None}]}
    before = copy.deepcopy(example)
    read_preference(example, preference_format)
    assert example == before


# ---- transcripts ----


def test_transcripts_are_split_at_turns_and_stripped() -> None:
    beginning = "\n\nHuman: Hi \n\nAssistant:  Hello\nyou\n\nHuman: Human: right?"
    example = row(f"{beginning}\n\nAssistant: walking", f"{beginning}\n\nAssistant: walked ")
    assert read_preference(example, TRANSCRIPT) == Preference(
        prompt=[user("Hi"), assistant("Hello\nyou"), user("Human: right?")],
        chosen=[assistant("walking")],
        rejected=[assistant("walked")],
    )


def test_a_transcript_may_begin_without_blank_lines() -> None:
    example = row(TURNS["chosen"].lstrip(), TURNS["rejected"])
    assert read_preference(example, TRANSCRIPT) == read_preference(CONVERSATIONS, IMPLICIT)


def test_two_answers_in_a_row_are_two_messages() -> None:
    beginning = "\n\nHuman: Hi\n\nAssistant: Hello\n\nAssistant: "
    preference = read_preference(row(f"{beginning}Yes", f"{beginning}No"), TRANSCRIPT)
    assert preference.prompt == [user("Hi"), assistant("Hello")]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("\n\nHuman: Hi\n\nAssistant: ", "empty-response"),
        ("\n\nHuman: Hi\n\nAssistant: No \n", "identical-responses"),
        ("\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Thanks", "no-assistant-response"),
        ("\n\nHuman: Hey\n\nAssistant: Yes", "different-prompts"),
        ("Once upon a time\n\nHuman: Hi\n\nAssistant: Yes", "not-a-transcript"),
        ("", "not-a-transcript"),
        (None, "malformed-row"),
    ],
)
def test_transcripts_that_make_no_pair_say_why(chosen: Any, expected: str) -> None:
    assert unusable(row(chosen, TURNS["rejected"]), TRANSCRIPT).reason == expected


# ---- plain text ----


def test_explicit_text_is_taken_as_it_stands() -> None:
    example = row(" Yes ", " No", prompt="Hi:\n")
    assert read_preference(example, EXPLICIT_TEXT) == Preference(prompt="Hi:\n", chosen=" Yes ", rejected=" No")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Hi: yes", "Hi: no", "Hi: "),
        ("I was walking", "I was walked over", "I was "),
        ("I walk", "I walked", "I "),
        ("Hi:\nyes", "Hi: no", "Hi:"),
        ("yes", "no", ""),
    ],
)
def test_the_prompt_of_plain_text_never_ends_inside_a_word(chosen: str, rejected: str, prompt: str) -> None:
    for one, other in ((chosen, rejected), (rejected, chosen)):
        preference = read_preference(row(one, other), PLAIN_TEXT)
        assert preference.prompt == prompt
        assert f"{prompt}{preference.chosen}" == one
        assert f"{prompt}{preference.rejected}" == other


@pytest.mark.parametrize(
    ("example", "preference_format", "expected"),
    [
        (row("Yes", "Yes", prompt="Hi"), EXPLICIT_TEXT, "identical-responses"),
        (row("\n", "Yes", prompt="Hi"), EXPLICIT_TEXT, "empty-response"),
        (row("No", "Yes", prompt=None), EXPLICIT_TEXT, "malformed-row"),
        (row(None, "Yes", prompt="Hi"), EXPLICIT_TEXT, "malformed-row"),
        (row("Hi: yes", "Hi: yes"), PLAIN_TEXT, "identical-responses"),
        (row("Hi: yes", "Hi: yes or no"), PLAIN_TEXT, "empty-response"),
    ],
)
def test_plain_text_that_makes_no_pair_says_why(
    example: dict[str, Any], preference_format: PreferenceFormat, expected: str
) -> None:
    assert unusable(example, preference_format).reason == expected

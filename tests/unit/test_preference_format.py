"""Which format a dataset is in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.preference_format import PreferenceFormat, detect_format, unused_columns
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


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (CONVERSATIONS, IMPLICIT),
        ({**CONVERSATIONS, "prompt": "Hi", "score": 1}, IMPLICIT),  # as UltraFeedback has it
        (row([assistant("Yes")], [assistant("No")], prompt=[user("Hi")]), EXPLICIT),
        (row([assistant("Yes")], [assistant("No")], prompt="Hi"), EXPLICIT),
        (row("Yes", "No", prompt=[user("Hi")]), EXPLICIT),
        (TURNS, TRANSCRIPT),
        ({**TURNS, "prompt": "Hi"}, TRANSCRIPT),
        (row(" Yes", " No", prompt="Hi:"), EXPLICIT_TEXT),
        (row("Hi: Yes", "Hi: No"), PLAIN_TEXT),
    ],
)
def test_each_format_is_recognised(example: dict[str, Any], expected: PreferenceFormat) -> None:
    assert detect_format(list(example), [example]) is expected


@pytest.mark.parametrize("before", [{"role": "system", "content": "Be kind"}, user("I am Bob")])
def test_messages_of_the_prompt_alone_are_not_left_out_without_a_word(before: dict[str, Any]) -> None:
    for prompt in ([before, user("Hi")], [before]):
        example = {**CONVERSATIONS, "prompt": prompt}
        with pytest.raises(DpoCacheError, match="`prompt` holds messages that `chosen` and `rejected` leave out"):
            detect_format(list(example), [example])
        repeated = {**example, **{side: [before, *CONVERSATIONS[side]] for side in ("chosen", "rejected")}}
        assert detect_format(list(repeated), [repeated]) is IMPLICIT
    repeating = {**CONVERSATIONS, "prompt": [user(" Hi\n")]}
    assert detect_format(list(repeating), [repeating]) is IMPLICIT


def test_one_odd_row_does_not_decide_the_format() -> None:
    odd, empty = row("Human: no", "Assistant: transcript"), row("", None)
    plain = row("Hi: yes", "Hi: no")
    assert detect_format(["chosen", "rejected"], [plain, TURNS, TURNS, empty]) is TRANSCRIPT
    assert detect_format(["chosen", "rejected"], [odd, plain, plain, empty]) is PLAIN_TEXT
    messages = row([{"role": "user", "content": "Hi"}] * 2, [{"role": "user", "content": "Hi"}])
    assert detect_format(["chosen", "rejected"], [plain, messages, messages]) is IMPLICIT
    assert detect_format(["chosen", "rejected"], [plain, messages, plain]) is PLAIN_TEXT


@pytest.mark.parametrize(
    "example",
    [
        {"text": "Hi"},
        {"chosen": "Yes"},
        row("Yes", "No", question="Hi"),
        row("Step 1: add", "Step 1: divide", trajectory=[{"from": "user", "value": "1+1?"}]),  # as UltraInteract has it
    ],
)
def test_other_columns_are_refused_with_what_would_fit(example: dict[str, Any]) -> None:
    with pytest.raises(DpoCacheError) as error:
        detect_format(list(example), [example])
    assert error.value.found == f"no preference format fits these columns: {', '.join(example)}"
    assert error.value.expected is not None
    for preference_format in PreferenceFormat:
        assert preference_format.description in error.value.expected


SHAREGPT = row([{"from": "gpt", "value": "Yes"}], [{"from": "gpt", "value": "No"}], prompt="Hi")
TEXTS, MESSAGES = row("Yes", "No", prompt="Hi"), row([assistant("Yes")], [assistant("No")], prompt="Hi")


@pytest.mark.parametrize(
    ("rows", "values", "next_step"),
    [
        (
            [SHAREGPT] * 3,
            "`prompt` is text; `chosen` is a list of objects with the keys from, value; "
            "`rejected` is a list of objects with the keys from, value",
            "write messages as lists of objects with `role` (user, assistant, …) and `content`",
        ),
        (
            [row(assistant("Yes"), assistant("No"), prompt="Hi")],
            "`prompt` is text; `chosen` is an object with the keys role, content; "
            "`rejected` is an object with the keys role, content",
            "write messages as lists of objects with `role` (user, assistant, …) and `content`",
        ),
        (
            [row("Yes", "No", prompt=None)] * 2,
            "`prompt` is null; `chosen` is text; `rejected` is text",
            "put text or messages into `prompt`, or drop that column if the responses begin with the prompt",
        ),
        ([row(1, "No")], "`chosen` is of type int; `rejected` is text", "put text or messages into these columns"),
        (
            [row(["Yes"], None), row([], None)],
            "`chosen` is a list of str in 1, an empty list in 1; `rejected` is null",
            "put text or messages into these columns",
        ),
        (
            [MESSAGES, TEXTS, TEXTS, MESSAGES],
            "`prompt` is text; `chosen` is messages in 2, text in 2; `rejected` is messages in 2, text in 2",
            "write all rows in the same way: the responses as text, or as messages",
        ),
    ],
)
def test_if_the_columns_are_right_their_values_are_told(
    rows: list[dict[str, Any]], values: str, next_step: str
) -> None:
    with pytest.raises(DpoCacheError) as error:
        detect_format(list(rows[0]), rows)
    told = f"no preference format fits the values of these columns (first {len(rows)} rows): {values}"
    assert error.value.found == told
    assert error.value.next_step == f"{next_step}, then run the same command again"


def test_words_that_responses_share_are_no_prompt_beside_a_column_that_may_hold_it() -> None:
    example = row("Sure, yes", "Sure, no", system="Be kind", Question="Hi?")
    with pytest.raises(DpoCacheError) as error:
        detect_format(list(example), [example])
    assert error.value.next_step == (
        "rename the column that holds the prompt to `prompt`, or drop Question if the responses begin with the prompt, "
        "then run the same command again"
    )
    del example["Question"]
    assert detect_format(list(example), [example]) is PLAIN_TEXT


def test_turns_that_responses_share_are_no_prompt_beside_a_column_that_may_hold_it() -> None:
    called, result = assistant("Let me look."), {"role": "tool", "content": "7"}
    example = row([called, result, assistant("Seven")], [called, result, assistant("Eight")])
    assert detect_format(list(example), [example]) is IMPLICIT
    with pytest.raises(DpoCacheError) as error:
        detect_format([*example, "conversations"], [example])
    assert error.value.next_step == (
        "rename the column that holds the prompt to `prompt`, or drop conversations if the responses begin with the "
        "prompt, then run the same command again"
    )


def test_a_column_that_is_not_there_cannot_be_renamed() -> None:
    example = row("Avast!", "Good day.")
    with pytest.raises(DpoCacheError) as error:
        detect_format(list(example), [example])
    assert error.value.next_step == "add a column `prompt`, then run the same command again"


@pytest.mark.parametrize("wrapped", [False, True])
def test_messages_written_as_json_text_are_not_taken_for_plain_text(wrapped: bool) -> None:
    conversations = ([{"role": "user", "content": "Hi"}, assistant(answer)] for answer in "ab")
    chosen, rejected = (json.dumps({"messages": turns, "tools": []} if wrapped else turns) for turns in conversations)
    with pytest.raises(DpoCacheError, match="hold messages written as JSON text"):
        detect_format(["chosen", "rejected"], [row(chosen, rejected)])


@pytest.mark.parametrize("answers", [("[1, 2, 3]", "[1, 2, 4"), ('{"name": "a"}', '{"messages": "b"}')])
def test_answers_in_json_are_text(answers: tuple[str, str]) -> None:
    example = row(*answers, prompt="Write JSON.")
    assert detect_format(list(example), [example]) is PreferenceFormat.EXPLICIT_TEXT


def test_columns_that_a_format_does_not_read_are_named() -> None:
    names = ["prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "score"]
    assert unused_columns(names, IMPLICIT) == ["prompt", "score"]
    assert unused_columns(names, EXPLICIT) == ["score"]
    assert unused_columns(names, PLAIN_TEXT) == ["prompt", "tools", "chat_template_kwargs", "score"]

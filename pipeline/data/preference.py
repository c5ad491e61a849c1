"""Rows of a preference dataset: which format they are in, and what one row says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ...errors import DpoCacheError

Message = dict[str, Any]
Row = Mapping[str, Any]

UNUSABLE_REASONS: dict[str, str] = {
    "malformed-row": "a column is missing, empty or of another type than in the rest of the dataset",
    "not-text": "a message holds an image or other content that is not text",
    "not-a-transcript": "the text does not begin with a Human or an Assistant turn",
    "no-assistant-answer": "a side does not end with an assistant's message",
    "different-prompts": "the two sides differ before their last message",
    "no-prompt": "nothing stands before the answers",
    "empty-answer": "an answer has no text",
    "identical-answers": "the two answers are the same",
    "template-refused": "the chat template raised an error for these messages",
    "template-rewrites-prompt": "the template renders the prompt differently once an answer follows",
    "template-rewrites-history": "the template renders an earlier answer differently once messages follow, "
    "so --mask all-turns cannot find it",
    "boundary-differs": "prompt and answer share a token on one side and not on the other",
    "nothing-scored": "all tokens of an answer count to its prompt (--mask open-instruct-last-turn)",
    "double-bos": "the text itself begins with a bos, so that two would stand at the start",
    "double-eos": "the answer itself ends with an eos, so that two would stand at the end",
    "too-long": "prompt and longer answer exceed --max-seq-length (--truncation drop)",
    "prompt-too-long": "the prompt leaves no room for an answer (--truncation truncate-response-right)",
    "answer-too-long": "the longer answer leaves no room for a prompt (--truncation truncate-prompt-left)",
    "identical-after-truncation": "the two answers differ only beyond --max-seq-length",
}
"""Every reason for which a row cannot become a pair, and what it means. The names are stable."""


class UnusableRow(Exception):  # noqa: N818 - an outcome that is counted, not an error that ends a build
    """A row that cannot become a pair.

    Attributes:
        reason: One of :data:`UNUSABLE_REASONS`.
        detail: What was found in this very row, where that says more than the reason.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in UNUSABLE_REASONS, reason
        self.reason = reason
        self.detail = detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        meaning = UNUSABLE_REASONS[self.reason]
        return f"{self.reason}: {meaning}" + (f" ({self.detail})" if self.detail else "")


class PreferenceFormat(StrEnum):
    """How a dataset's columns hold prompt and answers."""

    IMPLICIT_MESSAGES = "implicit-messages"
    EXPLICIT_MESSAGES = "explicit-messages"
    TRANSCRIPT = "transcript"
    EXPLICIT_TEXT = "explicit-text"
    PLAIN_TEXT = "plain-text"

    @property
    def description(self) -> str:
        """One line for the log."""
        return _DESCRIPTIONS[self]

    @property
    def uses_chat_template(self) -> bool:
        """Whether rows become messages; the two plain formats are tokenized as they stand."""
        return self not in (PreferenceFormat.EXPLICIT_TEXT, PreferenceFormat.PLAIN_TEXT)


_DESCRIPTIONS = {
    PreferenceFormat.IMPLICIT_MESSAGES: "`chosen` and `rejected` are whole conversations, the prompt is all but "
    "their last message",
    PreferenceFormat.EXPLICIT_MESSAGES: "`prompt`, `chosen` and `rejected` are messages (or `prompt` or the answers "
    "their text)",
    PreferenceFormat.TRANSCRIPT: r"`chosen` and `rejected` are transcripts, '\n\nHuman: … \n\nAssistant: …', split "
    "at turns",
    PreferenceFormat.EXPLICIT_TEXT: "`prompt`, `chosen` and `rejected` are plain text, no chat template is applied",
    PreferenceFormat.PLAIN_TEXT: "`chosen` and `rejected` are plain text, the prompt is the words they begin with in "
    "common, no chat template is applied",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One row, read: a prompt and two answers to it.

    Messages (prompt a list of at least one, each answer a list of exactly one assistant's message) are rendered by
    a chat template; plain text (all three strings) is not.
    """

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# ---- which format ----


def detect_format(column_names: Sequence[str], first_rows: Iterable[Row]) -> PreferenceFormat:
    """Recognise a dataset's format from its columns and its first rows.

    Raises:
        DpoCacheError: ``chosen`` and ``rejected`` are not both there, or hold neither messages nor text.
    """
    rows = [row for row in first_rows if row.get("chosen") and row.get("rejected")]
    has_prompt = "prompt" in column_names
    answers = [row[side] for row in rows for side in ("chosen", "rejected")]
    prompts = [row.get("prompt") for row in rows] if has_prompt else []

    if mostly(_is_messages, answers):
        # A `prompt` column beside whole conversations (UltraFeedback) only repeats their first message.
        answers_alone = mostly(lambda answer: answer[0]["role"] == "assistant", answers)
        explicit = has_prompt and answers_alone
        return PreferenceFormat.EXPLICIT_MESSAGES if explicit else PreferenceFormat.IMPLICIT_MESSAGES
    if mostly(_is_text, answers):
        if mostly(_is_transcript, answers):
            return PreferenceFormat.TRANSCRIPT
        if mostly(_is_messages, prompts):
            return PreferenceFormat.EXPLICIT_MESSAGES
        if mostly(_is_text, prompts):
            return PreferenceFormat.EXPLICIT_TEXT
        # Without words in common there is no prompt in these texts; it stands in a column of another name.
        if not has_prompt and mostly(lambda row: bool(_common_words(row["chosen"], row["rejected"])), rows):
            return PreferenceFormat.PLAIN_TEXT
    raise DpoCacheError(
        f"no preference format fits these columns: {', '.join(column_names) or 'none'}",
        expected="; or ".join(f"{name}: {name.description}" for name in PreferenceFormat),
        next_step="rename or build the columns, then run the same command again",
    )


def unused_columns(column_names: Sequence[str], preference_format: PreferenceFormat) -> list[str]:
    """The columns that this format does not read, to be named in the log."""
    used = {"chosen", "rejected"}
    if preference_format in (PreferenceFormat.EXPLICIT_MESSAGES, PreferenceFormat.EXPLICIT_TEXT):
        used |= {"prompt"}
    if preference_format.uses_chat_template:
        used |= {"tools", "chat_template_kwargs"}
    return [name for name in column_names if name not in used]


def mostly(is_so: Callable[[Any], bool], values: Sequence[Any]) -> bool:
    """Whether more than half of the values (and at least one) are so: one odd row must not decide a format."""
    return sum(1 for value in values if is_so(value)) * 2 > len(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


# ---- one row ----


def read_preference(row: Row, preference_format: PreferenceFormat) -> Preference:
    """Read one row.

    Raises:
        UnusableRow: The row says nothing that could be trained on; by reason.
    """
    if not preference_format.uses_chat_template:
        return _read_text(row, has_prompt=preference_format is PreferenceFormat.EXPLICIT_TEXT)

    match preference_format:
        case PreferenceFormat.TRANSCRIPT:
            chosen, rejected = (_turns(_text(row, side)) for side in ("chosen", "rejected"))
        case PreferenceFormat.EXPLICIT_MESSAGES:
            prompt = _messages(row, "prompt", role_of_text="user")
            chosen, rejected = (
                _continued(prompt, _messages(row, side, role_of_text="assistant")) for side in ("chosen", "rejected")
            )
        case _:
            chosen, rejected = (_messages(row, side) for side in ("chosen", "rejected"))
    return _split_conversations(
        chosen,
        rejected,
        tools=_json_column(row, "tools", list),
        chat_template_kwargs=_json_column(row, "chat_template_kwargs", dict),
    )


def _split_conversations(
    chosen: list[Message],
    rejected: list[Message],
    *,
    tools: list[dict[str, Any]] | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> Preference:
    """Two whole conversations into the prompt they share and the one answer in which they differ."""
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1]["role"] != "assistant":
            last = conversation[-1]["role"] if conversation else "no message"
            raise UnusableRow("no-assistant-answer", f"{side} ends with {last}")
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise UnusableRow("different-prompts", _first_difference(prompt, rejected[:-1]))
    if not prompt:
        raise UnusableRow("no-prompt")
    for side, answer in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
        # Whatever else a message carries (tool calls, reasoning) is text for the template.
        if not (answer.get("content") or "").strip() and answer.keys() <= {"role", "content"}:
            raise UnusableRow("empty-answer", side)
    if chosen[-1] == rejected[-1]:
        raise UnusableRow("identical-answers")
    return Preference(
        prompt=prompt,
        chosen=chosen[-1:],
        rejected=rejected[-1:],
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )


def _first_difference(ours: list[Message], theirs: list[Message]) -> str:
    if len(ours) != len(theirs):
        return f"{len(ours) + 1} messages against {len(theirs) + 1}"
    number = next(i for i, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our != their)
    return f"message {number + 1}"


def _messages(row: Row, column: str, *, role_of_text: str | None = None) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str) and role_of_text is not None:
        return [{"role": role_of_text, "content": value}] if value else []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UnusableRow("malformed-row", f"{column} is no list of messages")
    return [_message(without_nulls(message), column) for message in value]


def _message(message: Message, column: str) -> Message:
    if not isinstance(message.get("role"), str):
        raise UnusableRow("malformed-row", f"a message of {column} has no role")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_text_part(part) for part in content)}
    if content is not None and not isinstance(content, str):
        raise UnusableRow("malformed-row", f"a message of {column} has a content of type {type(content).__name__}")
    return message


def _text_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UnusableRow("not-text")
    return str(part["text"])


def _continued(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The whole conversation, whether or not the answer column repeats the prompt."""
    return answer if prompt and answer[: len(prompt)] == prompt else prompt + answer


def without_nulls(value: Any) -> Any:
    """The same value without keys that are null.

    A table gives every row the keys of all rows, null where there were none; a template must not see those.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _json_column(row: Row, column: str, kind: type) -> Any:
    """A column that may hold its value as JSON text, as datasets do whose rows differ in keys; empty is None."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise UnusableRow("malformed-row", f"{column} is no JSON: {error}") from None
    else:
        value = without_nulls(value)
    if value is not None and not isinstance(value, kind):
        raise UnusableRow("malformed-row", f"{column} is a {type(value).__name__}, not a {kind.__name__}")
    return value or None


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _turns(transcript: str) -> list[Message]:
    """A transcript into messages, each turn's text stripped."""
    before, *parts = _TURN.split("\n\n" + transcript.lstrip())
    if before or not parts:
        raise UnusableRow("not-a-transcript")
    return [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[0::2], parts[1::2], strict=True)
    ]


# ---- plain text ----


def _read_text(row: Row, *, has_prompt: bool) -> Preference:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise UnusableRow("identical-answers")
    if has_prompt:
        prompt = _text(row, "prompt")
    else:
        prompt = _common_words(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise UnusableRow("empty-answer", side)
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise UnusableRow("malformed-row", f"{column} is no text")
    return value


def _common_words(one: str, other: str) -> str:
    """The longest common beginning that ends where a word ends on both sides."""
    pairs = zip(one, other, strict=False)
    length = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(one), len(other)))
    next_characters = one[length : length + 1] + other[length : length + 1]
    inside_a_word = bool(next_characters) and not next_characters.isspace()
    common = one[:length]
    return re.sub(r"\S+\Z", "", common) if inside_a_word else common

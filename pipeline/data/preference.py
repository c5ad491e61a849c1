"""What one row of a preference dataset says: a prompt and two responses to it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .preference_format import PreferenceFormat, Row, common_words
from .unusable_row import UnusableRow

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One row, read: a prompt and two responses to it.

    Messages are rendered by a chat template: the prompt is a list of at least one, and a response one that begins and
    ends with an assistant's message, nearly always the same one. In between stand what tools or users said to it.
    Plain text (all three strings) is not rendered.
    """

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


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
    """Two whole conversations into the prompt they share and the responses in which they differ."""
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1]["role"] != "assistant":
            last = conversation[-1]["role"] if conversation else "no message"
            raise UnusableRow("no-assistant-response", f"{side} ends with {last}")
    if chosen == rejected:
        raise UnusableRow("identical-responses")
    shared = _num_shared_messages(chosen, rejected)
    if not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        raise UnusableRow("different-prompts", f"message {shared + 1}")
    if not shared:
        raise UnusableRow("no-prompt")
    for side, response in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if any(message["role"] == "assistant" and _says_nothing(message) for message in response):
            raise UnusableRow("empty-response", side)
    return Preference(
        prompt=chosen[:shared],
        chosen=chosen[shared:],
        rejected=rejected[shared:],
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )


def _num_shared_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both conversations begin with, at least one of each left over."""
    couples = enumerate(zip(chosen, rejected, strict=False))
    first_difference = next((number for number, (one, other) in couples if one != other), len(chosen))
    return min(first_difference, len(chosen) - 1, len(rejected) - 1)


def _says_nothing(message: Message) -> bool:
    """Whatever else a message carries (tool calls, reasoning) is text for the template."""
    return not (message.get("content") or "").strip() and message.keys() <= {"role", "content"}


def _messages(row: Row, column: str, *, role_of_text: str | None = None) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str) and role_of_text is not None:
        return [{"role": role_of_text, "content": value}] if value else []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UnusableRow("malformed-row", f"{column} is no list of messages")
    return [_message(_without_nulls(message), column) for message in value]


def _message(message: Message, column: str) -> Message:
    if not isinstance(message.get("role"), str):
        raise UnusableRow("malformed-row", f"a message of {column} has no role")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_text_part(part) for part in content)}
    if content is not None and not isinstance(content, str):
        raise UnusableRow("malformed-row", f"a message of {column} has a content of type {type(content).__name__}")
    if content is None and message.get("tool_calls"):
        # OpenAI's format has null here. Many templates, Qwen3's among them, fail where they find no text to join.
        return {**message, "content": ""}
    return message


def _text_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UnusableRow("not-text")
    return str(part["text"])


def _continued(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The whole conversation, whether or not the answer column repeats the prompt."""
    return answer if prompt and answer[: len(prompt)] == prompt else prompt + answer


def _without_nulls(value: Any) -> Any:
    """The same value without keys that are null.

    A table gives every row the keys of all rows, null where there were none; a template must not see those.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _json_column(row: Row, column: str, kind: type) -> Any:
    """A column that may hold its value as JSON text, as datasets do whose rows differ in keys; empty is None."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise UnusableRow("malformed-row", f"{column} is no JSON: {error}") from None
        except RecursionError:
            raise UnusableRow("malformed-row", f"{column} nests JSON too deeply") from None
    else:
        value = _without_nulls(value)
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
        raise UnusableRow("identical-responses")
    if has_prompt:
        prompt = _text(row, "prompt")
    else:
        prompt = common_words(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise UnusableRow("empty-response", side)
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise UnusableRow("malformed-row", f"{column} is no text")
    return value

"""Which format a dataset is in: how its columns hold prompt and answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from ...errors import DpoCacheError

Row = Mapping[str, Any]
TELLING_COLUMNS = ("prompt", "chosen", "rejected")
"""The columns that tell a format."""
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""The columns that a chat template is given beside messages."""
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
"""The columns in which datasets keep what a text model cannot read."""
_PROMPTS_ELSEWHERE = (
    "question", "instruction", "input", "query", "problem", "context", "history", "trajectory",
    "conversation", "conversations", "messages",
)  # fmt: skip
"""The columns in which datasets keep the prompt where none is called ``prompt``."""


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
    PreferenceFormat.IMPLICIT_MESSAGES: "`chosen` and `rejected` are whole conversations; the prompt is the messages "
    "with which both begin",
    PreferenceFormat.EXPLICIT_MESSAGES: "`prompt`, `chosen` and `rejected` are messages (or the prompt or the "
    "responses are plain text)",
    PreferenceFormat.TRANSCRIPT: r"`chosen` and `rejected` are transcripts, '\n\nHuman: … \n\nAssistant: …', split "
    "at turns",
    PreferenceFormat.EXPLICIT_TEXT: "`prompt`, `chosen` and `rejected` are plain text; no chat template is applied",
    PreferenceFormat.PLAIN_TEXT: "`chosen` and `rejected` are plain text; the prompt is the words with which both "
    "begin; no chat template is applied",
}


def detect_format(column_names: Sequence[str], first_rows: Iterable[Row]) -> PreferenceFormat:
    """Recognise a dataset's format from its columns and its first rows.

    Raises:
        DpoCacheError: ``chosen`` and ``rejected`` are not both there, or hold neither messages nor text; or text that
            is messages in JSON, which is nothing to train on as it stands; or conversations without the messages of
            ``prompt``.
    """
    first_rows = list(first_rows)
    rows = [row for row in first_rows if row.get("chosen") and row.get("rejected")]
    has_prompt = "prompt" in column_names
    answers = [row[side] for row in rows for side in ("chosen", "rejected")]
    prompts = [row.get("prompt") for row in rows] if has_prompt else []

    if _mostly(_is_messages, answers):
        # A `prompt` column beside whole conversations (UltraFeedback) only repeats their first message.
        answers_alone = _mostly(lambda answer: _is_messages(answer) and answer[0]["role"] == "assistant", answers)
        if answers_alone and has_prompt:
            return PreferenceFormat.EXPLICIT_MESSAGES
        if _mostly(_leaves_prompt_out, rows):
            raise DpoCacheError(
                "`prompt` holds messages that `chosen` and `rejected` leave out",
                expected="the responses alone in `chosen` and `rejected`, or whole conversations",
                next_step="put these messages in front of both, or drop `prompt` if they are not meant to count",
            )
        # Turns that both answers begin with are not the whole prompt if a column of another name holds the question.
        if not answers_alone or not _prompts_elsewhere(column_names):
            return PreferenceFormat.IMPLICIT_MESSAGES
    elif _mostly(_is_text, answers):
        if _mostly(_is_messages_as_json, answers):
            raise DpoCacheError(
                "`chosen` and `rejected` hold messages written as JSON text",
                expected="lists of messages, or plain text",
                next_step="read the columns with json.loads and save the lists of messages",
            )
        if _mostly(_is_transcript, answers):
            return PreferenceFormat.TRANSCRIPT
        if _mostly(_is_messages, prompts):
            return PreferenceFormat.EXPLICIT_MESSAGES
        if _mostly(_is_text, prompts):
            return PreferenceFormat.EXPLICIT_TEXT
        # Without words in common there is no prompt in these texts; it stands in a column of another name. Words in
        # common are no proof that it does not: the solutions of UltraInteract all begin with "Step 1:".
        texts = [row for row in rows if _is_text(row["chosen"]) and _is_text(row["rejected"])]
        may_begin_with_prompt = not has_prompt and not _prompts_elsewhere(column_names)
        if may_begin_with_prompt and _mostly(lambda row: bool(common_words(row["chosen"], row["rejected"])), texts):
            return PreferenceFormat.PLAIN_TEXT
    found, next_step = _why_none_fits(column_names, first_rows)
    raise DpoCacheError(
        f"no preference format fits {found}",
        expected="\n    ".join(["one of these", *(f"{name}: {name.description}" for name in PreferenceFormat)]),
        next_step=f"{next_step}, then run the same command again",
    )


def unused_columns(column_names: Sequence[str], preference_format: PreferenceFormat) -> list[str]:
    """The columns that this format does not read, to be named in the log."""
    used = {"chosen", "rejected"}
    if preference_format in (PreferenceFormat.EXPLICIT_MESSAGES, PreferenceFormat.EXPLICIT_TEXT):
        used |= {"prompt"}
    if preference_format.uses_chat_template:
        used |= set(TEMPLATE_COLUMNS)
    return [name for name in column_names if name not in used]


def _mostly(is_so: Callable[[Any], bool], values: Sequence[Any]) -> bool:
    """Whether more than half of the values (and at least one) are so: one odd row must not decide a format."""
    return sum(1 for value in values if is_so(value)) * 2 > len(values)


def _prompts_elsewhere(column_names: Sequence[str]) -> list[str]:
    return [name for name in column_names if name.lower() in _PROMPTS_ELSEWHERE]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _leaves_prompt_out(row: Row) -> bool:
    """Whether the prompt has messages that the conversation lacks: a system message, or what was said before."""
    prompt: Any = row.get("prompt")
    conversation: Any = row["chosen"]
    if not _is_messages(prompt) or not _is_messages(conversation):
        return False
    said = [_words(message) for message in conversation]
    return any(_words(message) not in said for message in prompt)


def _words(message: Any) -> tuple[Any, list[str]] | None:
    """What a message says, whatever the white space in it."""
    return (message.get("role"), str(message.get("content")).split()) if isinstance(message, dict) else None


def _is_messages_as_json(value: Any) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return False
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return False
    # Datasets of tool calls have {"messages": […], "tools": […]} there; any other object is an answer in JSON.
    return _is_messages(parsed.get("messages") if isinstance(parsed, dict) else parsed)


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:"))


def common_words(one: str, other: str) -> str:
    """The longest common beginning that ends where a word ends on both sides."""
    pairs = zip(one, other, strict=False)
    length = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(one), len(other)))
    next_characters = one[length : length + 1] + other[length : length + 1]
    inside_a_word = bool(next_characters) and not next_characters.isspace()
    common = one[:length]
    return re.sub(r"\S+\Z", "", common) if inside_a_word else common


# ---- why none fits ----

TEXT, MESSAGES = "text", "messages"


def _why_none_fits(column_names: Sequence[str], first_rows: Sequence[Row]) -> tuple[str, str]:
    """What is wrong, the columns' names or their values, and what to do about it."""
    these_columns = f"these columns: {', '.join(column_names) or 'none'}"
    if not {"chosen", "rejected"} <= set(column_names):
        return these_columns, "rename or build the columns"
    kinds = {
        name: Counter(_kind(row.get(name)) for row in first_rows) for name in TELLING_COLUMNS if name in column_names
    }
    of_responses = kinds["chosen"].keys() | kinds["rejected"].keys()
    if "prompt" not in kinds and of_responses in ({TEXT}, {MESSAGES}):
        if set(column_names) == {"chosen", "rejected"}:
            return these_columns, "add a column `prompt`"
        elsewhere = _prompts_elsewhere(column_names)
        unless = f", or drop {' and '.join(elsewhere)} if the responses begin with the prompt" if elsewhere else ""
        return these_columns, f"rename the column that holds the prompt to `prompt`{unless}"
    values = "; ".join(f"`{name}` is {_listed(counts)}" for name, counts in kinds.items())
    return f"the values of these columns (first {len(first_rows)} rows): {values}", _remedy(kinds)


def _remedy(kinds: Mapping[str, Counter[str]]) -> str:
    every_kind = {kind for counts in kinds.values() for kind in counts}
    if any("with the keys" in kind for kind in every_kind):
        return "write messages as lists of objects with `role` (user, assistant, …) and `content`"
    if not kinds.get("prompt", Counter()).keys() <= {TEXT, MESSAGES}:
        return "put text or messages into `prompt`, or drop that column if the responses begin with the prompt"
    if every_kind == {TEXT, MESSAGES}:
        return "write all rows in the same way: the responses as text, or as messages"
    return "put text or messages into these columns"


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if _is_messages(value):
        return MESSAGES
    if isinstance(value, list) and value:
        first = value[0]
        keys = f"objects with the keys {', '.join(first)}" if isinstance(first, dict) else type(first).__name__
        return f"a list of {keys}"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(value)}"
    if isinstance(value, str):
        return TEXT
    if value is None:
        return "null"
    return "an empty list" if isinstance(value, list) else f"of type {type(value).__name__}"


def _listed(counts: Counter[str]) -> str:
    """The kinds of a column's values: with their numbers where there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{kind} in {count}" for kind, count in counts.most_common())

"""Rows of preference datasets, and short names of the formats they come in."""

from __future__ import annotations

from typing import Any

from dpo_cache.pipeline.data.preference_format import PreferenceFormat

IMPLICIT = PreferenceFormat.IMPLICIT_MESSAGES
EXPLICIT = PreferenceFormat.EXPLICIT_MESSAGES
TRANSCRIPT = PreferenceFormat.TRANSCRIPT
EXPLICIT_TEXT = PreferenceFormat.EXPLICIT_TEXT
PLAIN_TEXT = PreferenceFormat.PLAIN_TEXT


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def row(chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, **columns}


CONVERSATIONS = row([user("Hi"), assistant("Yes")], [user("Hi"), assistant("No")])
TURNS = row("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No")

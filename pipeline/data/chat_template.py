"""Which chat template turns messages into text: one of ours by name, one from a file, or the tokenizer's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ...errors import DpoCacheError
from .named_path import named_path

PINNED_TEMPLATES = ("tulu", "tulu-bos", "olmo-thinker")
"""Templates whose text is part of this package, so that a recipe's tokens do not move with a tokenizer's files."""

# Some templates write the current date into a system turn; tokens, and with them every key, would change each day.
# Jinja finds this macro before the clock of `transformers`. The date is the one that Llama's templates fall back to.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(
        f" | replace('{code}', '{value}')"
        for code, value in {
            "%-d": "26", "%d": "26", "%b": "Jul", "%B": "July", "%-m": "7", "%m": "07", "%y": "24", "%Y": "2024",
            "%a": "Fri", "%A": "Friday", "%H": "00", "%M": "00", "%S": "00",
        }.items()
    )
    + " -}}{%- endmacro %}\n"  # trim_blocks takes this newline, and nothing of the template
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A Jinja template, and where it came from.

    Attributes:
        text: The template, with a fixed date in front of it where it asks for the current one.
        name: A pinned name, ``tokenizer``, ``tokenizer:NAME`` or a file's name.
    """

    text: str
    name: str

    @property
    def sha256(self) -> str:
        """Digest of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def resolve_chat_template(tokenizer: Any, choice: str | None) -> ChatTemplate | None:
    """Find the template that a choice means.

    Args:
        tokenizer: A tokenizer of ``transformers``.
        choice: A name of :data:`PINNED_TEMPLATES`, a name among the tokenizer's own templates, a file, or None for
            the tokenizer's default template.

    Returns:
        The template; None where nothing was chosen and the tokenizer has none, which is fine for plain text.

    Raises:
        DpoCacheError: The choice is none of these, or writes a bos or eos that the tokenizer does not have.
    """
    own = _own_templates(tokenizer)
    if choice is None:
        return _dated(own["default"], name="tokenizer") if "default" in own else None
    template = _chosen_template(own, choice)
    for token in ("bos_token", "eos_token"):
        # Jinja renders what it does not know as nothing, and answers would silently lose their end.
        if token in template.text and getattr(tokenizer, token) is None:
            raise DpoCacheError(
                f"--chat-template {choice} writes {token}, and the tokenizer has none",
                next_step="choose a tokenizer that defines it, or another template",
            )
    return template


def without_fixed_date(text: str) -> str:
    """A :attr:`ChatTemplate.text` as it was found, to be used where the date may be today's."""
    return text.removeprefix(_FIXED_DATE)


def resolve_tool_template(tokenizer: Any, choice: str | None) -> ChatTemplate | None:
    """The template for rows with tools, where a tokenizer has one of its own and nothing was chosen.

    As in ``transformers``, that is the one named ``tool_use``. None where all rows are rendered with
    :func:`resolve_chat_template`'s.
    """
    own = _own_templates(tokenizer)
    if choice is not None or "tool_use" not in own:
        return None
    return _dated(own["tool_use"], name="tokenizer:tool_use")


def _chosen_template(own: dict[str, str], choice: str) -> ChatTemplate:
    if choice in PINNED_TEMPLATES:
        text = (resources.files(__package__) / "templates" / f"{choice}.jinja").read_text(encoding="utf-8")
        return _dated(text, name=choice)
    if choice in own:
        return _dated(own[choice], name=f"tokenizer:{choice}")
    path = named_path(choice)
    if path.is_file():
        return _dated(path.read_text(encoding="utf-8"), name=path.name)
    raise DpoCacheError(
        f"--chat-template {choice} is neither a file nor a known name",
        expected=f"a file, or one of {', '.join([*PINNED_TEMPLATES, *own])}",
        next_step="leave the option out to use the tokenizer's own template",
    )


def _dated(text: str, *, name: str) -> ChatTemplate:
    return ChatTemplate(text=_FIXED_DATE + text if "strftime_now" in text else text, name=name)


def _own_templates(tokenizer: Any) -> dict[str, str]:
    own = tokenizer.chat_template
    if own is None:
        return {}
    return dict(own) if isinstance(own, dict) else {"default": own}

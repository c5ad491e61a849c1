"""Rows that cannot become a pair: every reason there is, by a stable name."""

from __future__ import annotations

UNUSABLE_REASONS: dict[str, str] = {
    "malformed-row": "a column is missing, empty or of another type than in the rest of the dataset",
    "lone-surrogate": "a text holds half of a character written in two parts (a lone surrogate): it is no Unicode text",
    "not-text": "a message holds an image or other content that is not text",
    "not-a-transcript": "the text does not begin with a Human or an Assistant turn",
    "no-assistant-response": "a side does not end with an assistant's message",
    "different-prompts": "the first message in which the two sides differ is not the assistant's on both",
    "several-messages": "the two sides differ before their last message; --mask response-turns scores everything that "
    "the assistant says from there on",
    "no-prompt": "nothing comes before the responses",
    "empty-response": "a response has no text",
    "identical-responses": "the two responses are the same",
    "template-refused": "the chat template raised an error for these messages",
    "template-rewrites-prompt": "the template renders the prompt differently once a response follows",
    "template-rewrites-history": "the template renders an earlier response differently once messages follow, "
    "so its tokens cannot be found",
    "boundary-differs": "prompt and response share a token on one side and not on the other",
    "nothing-scored": "all tokens of a response belong to its prompt",
    "double-bos": "the text itself begins with a bos, so that two would stand at the start",
    "double-eos": "the response itself ends with an eos, so that it would end with two",
    "too-long": "prompt and longer response exceed --max-seq-length (--truncation drop)",
    "prompt-too-long": "the prompt leaves no room for a response (--truncation truncate-response-right)",
    "response-too-long": "the longer response leaves no room for a prompt (--truncation truncate-prompt-left)",
    "identical-after-truncation": "the two responses differ only beyond --max-seq-length",
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

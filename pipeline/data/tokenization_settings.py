"""All that decides which tokens a preference becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import DpoCacheError

Truncation = Literal["drop", "truncate-prompt-left", "truncate-response-right"]
MaskChoice = Literal["last-turn", "response-turns", "all-turns", "open-instruct-last-turn", "open-instruct-all-turns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizationSettings:
    """What a build was asked for, plain enough to be recorded and sent to other processes.

    Attributes:
        tokenizer: Folder or Hub id of the tokenizer.
        tokenizer_revision: Its revision, for a Hub id.
        chat_template: A pinned name, a file, or None for the tokenizer's own.
        max_seq_length: Most tokens of prompt and longer answer together; None for no limit.
        truncation: What becomes of longer pairs: dropped, or the prompt cut at its left (a leading bos stays), or
            each answer cut at its right (its eos is lost then).
        mask: Score the last turn only, every assistant's turn behind the messages that both sides share, or every
            one; the first and the last also token by token as open-instruct did.
        trust_remote_code: Whether Python code that comes with the tokenizer may run.
    """

    tokenizer: str
    tokenizer_revision: str | None = None
    chat_template: str | None = None
    max_seq_length: int | None = None
    truncation: Truncation = "drop"
    mask: MaskChoice = "last-turn"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--truncation", self.truncation, get_args(Truncation)),
            ("--mask", self.mask, get_args(MaskChoice)),
        ):
            if value not in choices:
                raise DpoCacheError(f"{option} {value} is unknown", expected=" or ".join(choices))
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise DpoCacheError(
                f"--max-seq-length {self.max_seq_length} holds no prompt and response", expected="at least 2"
            )
        if self.max_seq_length is None and self.truncation != "drop":
            raise DpoCacheError(
                f"--truncation {self.truncation} without a length does nothing", next_step="add --max-seq-length N"
            )

    @property
    def scores_all_turns(self) -> bool:
        """Whether the turns of the prompt are scored too."""
        return self.mask.endswith("all-turns")

    @property
    def takes_several_messages(self) -> bool:
        """Whether the sides may differ before their last message."""
        return not self.mask.endswith("last-turn")

    @property
    def counts_tokens(self) -> bool:
        """Whether answers are found by counts of tokens, as open-instruct finds them."""
        return self.mask.startswith("open-instruct")

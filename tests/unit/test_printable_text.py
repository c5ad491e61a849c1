"""What of a stranger's text reaches a terminal or a page."""

from __future__ import annotations

import pytest
from dpo_cache.pipeline.data.printable_text import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\r\n\tc\x9b", "a�[2Jb�\n\tc�"),
        ("left\u202eto right", "left�to right"),
        ("half of a pair: \ud83d", "half of a pair: �"),
    ],
)
def test_what_steers_a_terminal_or_cannot_be_printed_is_replaced(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["10\u00a0%", "東京\u3000大阪", "خانه\u200cها", "👩\u200d🔬"])
def test_wide_spaces_and_the_joiners_of_scripts_and_emoji_are_text(text: str) -> None:
    assert printable(text) == text


def test_a_name_stays_within_its_line() -> None:
    assert one_line("owner/model\n  next: a command\x1b[2J") == "owner/model   next: a command�[2J"

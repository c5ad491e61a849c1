from __future__ import annotations

import pytest
from dpo_cache.pipeline.cache.message_value import message_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0123456789abcdef" * 4, "'0123456789ab…'"),
        ("bfloat16", "'bfloat16'"),
        ("ABCDEF" * 11, repr("ABCDEF" * 11)),
        (None, "None"),
        (10000.0, "10000.0"),
    ],
)
def test_a_digest_is_quoted_by_its_first_digits_and_all_else_whole(value: object, text: str) -> None:
    assert message_value(value) == text

"""Why a row is unusable: names that stay, and reasons that travel."""

from __future__ import annotations

import pickle

from dpo_cache.pipeline.data.unusable_row import UNUSABLE_REASONS, UnusableRow


def test_the_names_of_reasons_are_stable() -> None:
    assert sorted(UNUSABLE_REASONS) == [
        "boundary-differs",
        "different-prompts",
        "double-bos",
        "double-eos",
        "empty-response",
        "identical-after-truncation",
        "identical-responses",
        "lone-surrogate",
        "malformed-row",
        "no-assistant-response",
        "no-prompt",
        "not-a-transcript",
        "not-text",
        "nothing-scored",
        "prompt-too-long",
        "response-too-long",
        "several-messages",
        "template-refused",
        "template-rewrites-history",
        "template-rewrites-prompt",
        "too-long",
    ]


def test_a_reason_crosses_a_process_boundary() -> None:
    copied = pickle.loads(pickle.dumps(UnusableRow("empty-response", "chosen")))
    assert (copied.reason, copied.detail) == ("empty-response", "chosen")

"""Why a row is unusable: names that stay, and reasons that travel."""

from __future__ import annotations

import pickle

from dpo_cache.pipeline.data.unusable_row import UNUSABLE_REASONS, UnusableRow


def test_the_names_of_reasons_are_stable() -> None:
    assert sorted(UNUSABLE_REASONS) == [
        "answer-too-long",
        "boundary-differs",
        "different-prompts",
        "double-bos",
        "double-eos",
        "empty-answer",
        "identical-after-truncation",
        "identical-answers",
        "lone-surrogate",
        "malformed-row",
        "no-assistant-answer",
        "no-prompt",
        "not-a-transcript",
        "not-text",
        "nothing-scored",
        "prompt-too-long",
        "several-messages",
        "template-refused",
        "template-rewrites-history",
        "template-rewrites-prompt",
        "too-long",
    ]


def test_a_reason_crosses_a_process_boundary() -> None:
    copied = pickle.loads(pickle.dumps(UnusableRow("empty-answer", "chosen")))
    assert (copied.reason, copied.detail) == ("empty-answer", "chosen")

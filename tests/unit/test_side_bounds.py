"""What rounding may explain, by the length of a side."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.scoring.side_bounds import side_bounds
from dpo_cache.stages.interchange import import_proof

TOKENS = [1, 4, 16, 500]


def test_a_short_side_may_round_further_in_bfloat16_and_not_in_float32() -> None:
    for dtype, expected in (
        ("bfloat16", [0.12, 0.06, 0.03, 0.03]),
        ("float16", [0.12, 0.06, 0.03, 0.03]),
        ("float32", [1e-4] * 4),
    ):
        assert side_bounds(dtype, torch.tensor(TOKENS)).tolist() == pytest.approx(expected)
        assert side_bounds(dtype, np.array(TOKENS)).tolist() == pytest.approx(expected)


def test_imported_values_of_answers_of_one_token_may_round_further(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = np.array([[-3.0, -40.0]])
    monkeypatch.setattr(import_proof, "_score", lambda *_, **__: ours)
    pair: Any = SimpleNamespace(chosen_tokens=1, rejected_tokens=20)
    config: Any = SimpleNamespace(values="sums", trust_remote_code=False)
    reference: Any = SimpleNamespace(identity=SimpleNamespace(compute_dtype="bfloat16"))

    def prove(chosen: float, rejected: float) -> import_proof.SampleSpread:
        return import_proof.prove_values(Path("x"), [pair], ours + np.array([chosen, rejected]), config, reference)

    assert prove(0.1, 0.5).max_per_token == pytest.approx(0.1)
    for chosen, rejected in ((0.13, 0.0), (0.0, 0.7), (np.nan, 0.0)):
        with pytest.raises(DpoCacheError, match="is not what the reference gives"):
            prove(chosen, rejected)

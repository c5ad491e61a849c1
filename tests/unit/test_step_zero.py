"""The proof that policy and cache agree, on real processes and a tiny model."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.objective import F_DIVERGENCES, LOSS_TRAITS, resolve_objective
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.pipeline.training.preference_loss import objective_at_reference
from dpo_cache.pipeline.training.step_zero import (
    StepZeroFigures,
    StepZeroProof,
    check_step_zero,
    read_step_zero,
    write_step_zero,
)
from training_factory import LAYOUT, make_engine, plain_side_logps, random_pairs, scored_pair, tiny_policy

FIGURES = StepZeroFigures(
    dtype="float32",
    pairs=5,
    sides=10,
    mean_per_token=1e-6,
    max_per_token=5e-6,
    bound_per_token=1e-4,
    loss=math.log(2),
    expected_loss=math.log(2),
    within_bound=True,
)


def figures_against_references(folder: str) -> list[dict[str, Any]]:
    """Step 0 of a policy against its own values, computed by plain PyTorch, and against those of other weights."""
    engine = make_engine(Path(folder), zero_stage=3, num_ranks=torch.distributed.get_world_size())
    return [_figures(engine, seed) for seed in (0, 1)]


def _figures(engine: PolicyEngine, seed: int) -> dict[str, Any]:
    reference = tiny_policy(seed=seed)
    rows = []
    for row in random_pairs(5):
        with torch.no_grad():
            chosen = plain_side_logps(reference, row.pair.prompt_ids, row.pair.chosen_ids)
            rejected = plain_side_logps(reference, row.pair.prompt_ids, row.pair.rejected_ids)
        rows.append(scored_pair(row.pair, float(chosen), float(rejected)))
    proof = StepZeroProof(engine.objective, dtype="float32", device=engine.device)
    mine = rows[engine.rank :: engine.num_ranks]
    proof.add(engine.micro_step(collate(mine, LAYOUT), num_pairs=len(rows), is_last=False))
    proof.add(engine.micro_step(collate([], LAYOUT), num_pairs=len(rows), is_last=True))
    return asdict(proof.figures())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_policy_that_is_the_reference_starts_at_ln_2_and_another_is_refused_on_every_rank(
    tmp_path: Path, num_ranks: int
) -> None:
    of_ranks = run_ranks(figures_against_references, str(tmp_path), num_ranks=num_ranks)
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
    for same, other in of_ranks:
        figures = StepZeroFigures(**same)
        assert (figures.pairs, figures.sides) == (5, 10)
        assert figures.loss == pytest.approx(math.log(2), abs=1e-5)
        assert figures.expected_loss == math.log(2)
        assert 0 < figures.mean_per_token <= figures.max_per_token < 1e-5
        check_step_zero(figures)
        with pytest.raises(DpoCacheError, match="policy and cached reference differ by") as caught:
            check_step_zero(StepZeroFigures(**other))
        assert "--allow-other-policy" in str(caught.value)


def test_a_distance_that_is_not_a_number_is_no_agreement() -> None:
    with pytest.raises(DpoCacheError, match="differ by nan nats per token"):
        check_step_zero(replace(FIGURES, max_per_token=math.nan, within_bound=False))


def test_a_tie_is_what_was_seen_to_be_rounding() -> None:
    assert replace(FIGURES, dtype="bfloat16", max_per_token=0.002, within_bound=True).tie_margin == 0.004
    assert replace(FIGURES, dtype="bfloat16", max_per_token=0.0, within_bound=True).tie_margin == 0.0
    assert replace(FIGURES, dtype="float32", max_per_token=0.0, within_bound=True).tie_margin == 5e-6
    another_policy = replace(FIGURES, dtype="bfloat16", max_per_token=0.5, within_bound=False)
    assert another_policy.tie_margin == 0.0


def test_figures_are_kept_as_json(tmp_path: Path) -> None:
    write_step_zero(tmp_path / "step0.json", FIGURES)
    assert read_step_zero(tmp_path / "step0.json") == FIGURES
    assert read_step_zero(tmp_path / "none.json") is None


def test_the_expected_loss_is_that_of_no_difference() -> None:
    """Values by hand: ln 2 for one logistic term, (1/2β)² for one square, and so on."""
    ln2 = math.log(2)
    expected = {
        "dpo": ln2,
        "dpo_norm": ln2,
        "ipo": 25.0,
        "ipo_sum": 25.0,
        "hinge": 1.0,
        "robust": ln2,
        "simpo": None,
        "wpo": None,
        "exo_pair": -ln2 - (math.log(1 - 1e-3) + math.log(1e-3)) / 2,
        "nca_pair": 2 * ln2,
        "bco_pair": 2 * ln2,
        "sppo_hard": 2 * 500.0**2,
        "aot": ln2,
        "aot_unpaired": ln2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": ln2 / 2 + 1 / 2,
    }
    assert {name: objective_at_reference(resolve_objective(name)) for name in LOSS_TRAITS} == pytest.approx(expected)
    assert objective_at_reference(resolve_objective("dpo=2,hinge=0.5")) == pytest.approx(2 * ln2 + 0.5)
    assert objective_at_reference(resolve_objective("dpo", nll_coef=0.1)) is None
    for divergence in F_DIVERGENCES:
        assert objective_at_reference(resolve_objective("dpo", f_divergence=divergence)) == pytest.approx(ln2)

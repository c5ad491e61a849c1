"""The proof that policy and cache agree, on real processes and a tiny model."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_run import run_ranks
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.data.token_pair import TokenPair
from dpo_cache.pipeline.training.micro_batch import collate
from dpo_cache.pipeline.training.objective import F_DIVERGENCES, LOSS_TRAITS, resolve_objective
from dpo_cache.pipeline.training.policy_engine import PolicyEngine
from dpo_cache.pipeline.training.preference_loss import objective_at_reference
from dpo_cache.pipeline.training.run_file import write_run_json
from dpo_cache.pipeline.training.step_zero import (
    StepZeroFigures,
    StepZeroProof,
    check_step_zero,
)
from dpo_cache.stages.training.step_zero_proof import recorded_figures
from training_factory import LAYOUT, make_engine, plain_side_logps, random_pairs, scored_pair, tiny_policy

FIGURES = StepZeroFigures(
    dtype="float32",
    pairs=5,
    sides=10,
    mean_per_token=1e-6,
    max_per_token=5e-6,
    max_in_bounds=5e-2,
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
        assert "--allow-numerics-mismatch" in str(caught.value)
        assert "--allow-other-policy" not in str(caught.value)  # a policy with the reference's weights is no other


ONE_TOKEN, LONG = 8, 2


def figures_of_short_sides(folder: str) -> dict[str, dict[str, Any]]:
    """Pairs of answers of one token and of twenty, by how far the cached sums are from the policy's."""
    engine = make_engine(Path(folder), zero_stage=0, num_ranks=1)
    random = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return random.integers(1, 64, length, dtype=np.int32)

    lengths = [1] * ONE_TOKEN + [20] * LONG
    pairs = [TokenPair(prompt_ids=ids(5), chosen_ids=ids(length), rejected_ids=ids(length)) for length in lengths]
    shifts = np.zeros((5, len(pairs), 2))
    shifts[0, 0, 0] = 0.1
    shifts[1, 0, 0] = 0.13
    shifts[2, :ONE_TOKEN] = 0.1
    shifts[3, -1, 1] = 0.04 * 20
    names = ("one side", "one side too far", "every short side", "one long side", "other weights")
    return {
        name: _shifted_figures(engine, int(name == "other weights"), pairs, of_pairs)
        for name, of_pairs in zip(names, shifts, strict=True)
    }


def _shifted_figures(engine: PolicyEngine, seed: int, pairs: list[TokenPair], shifts: Any) -> dict[str, Any]:
    reference = tiny_policy(seed=seed)
    rows = []
    for pair, shift in zip(pairs, shifts, strict=True):
        with torch.no_grad():
            chosen = plain_side_logps(reference, pair.prompt_ids, pair.chosen_ids) + shift[0]
            rejected = plain_side_logps(reference, pair.prompt_ids, pair.rejected_ids) + shift[1]
        rows.append(scored_pair(pair, float(chosen), float(rejected)))
    proof = StepZeroProof(engine.objective, dtype="bfloat16", device=engine.device)
    proof.add(engine.micro_step(collate(rows, LAYOUT), num_pairs=len(rows), is_last=True))
    return asdict(proof.figures())


def test_in_bfloat16_a_side_of_one_token_may_round_further_and_nothing_wrong_gets_by(tmp_path: Path) -> None:
    (found,) = run_ranks(figures_of_short_sides, str(tmp_path), num_ranks=1)
    figures = {name: StepZeroFigures(**of_name) for name, of_name in found.items()}
    within = figures.pop("one side")
    check_step_zero(within)
    assert within.max_per_token == pytest.approx(0.1, abs=1e-4)
    assert within.max_in_bounds == pytest.approx(0.1 / 0.12, abs=1e-3)
    for name, of_name in figures.items():
        assert not of_name.within_bound, name
        with pytest.raises(DpoCacheError, match="more for one side of under 16 scored tokens"):
            check_step_zero(of_name)


def test_a_distance_that_is_not_a_number_is_no_agreement() -> None:
    with pytest.raises(DpoCacheError, match="differ by nan nats per token"):
        check_step_zero(replace(FIGURES, max_per_token=math.nan, within_bound=False))


def test_a_tie_is_what_was_seen_to_be_rounding() -> None:
    def tie(dtype: str, in_bounds: float, *, policy_is_reference: bool = True) -> float:
        bound = {"bfloat16": 0.03, "float32": 1e-4}[dtype]
        seen = replace(
            FIGURES, dtype=dtype, max_in_bounds=in_bounds, bound_per_token=bound, within_bound=in_bounds <= 1
        )
        return seen.tie_margin(policy_is_reference=policy_is_reference)

    assert tie("bfloat16", 0.1) == pytest.approx(0.006)
    assert tie("bfloat16", 0.0) == 0.0
    assert tie("float32", 0.0) == 5e-6
    assert tie("bfloat16", 0.1, policy_is_reference=False) == pytest.approx(0.006)


def test_a_reference_computed_otherwise_has_ties_up_to_the_bound_of_bfloat16() -> None:
    """As with ``--allow-numerics-mismatch``: the distance is beyond the bound, and no preference was learned yet."""
    in_float32 = replace(FIGURES, max_in_bounds=60.0, within_bound=False)  # 0.006 per token, from a bfloat16 cache
    assert in_float32.tie_margin(policy_is_reference=True) == pytest.approx(0.012)
    assert in_float32.tie_margin(policy_is_reference=False) == 0.0
    quantized = replace(FIGURES, dtype="bfloat16", max_in_bounds=9.0, bound_per_token=0.03, within_bound=False)
    assert quantized.tie_margin(policy_is_reference=True) == 0.03


def test_figures_are_kept_as_json(tmp_path: Path) -> None:
    record = tmp_path / "step0.json"
    write_run_json(record, {**asdict(FIGURES), "reference_id": "a"})
    assert recorded_figures(record) == FIGURES
    assert recorded_figures(tmp_path / "none.json") is None
    write_run_json(record, asdict(replace(FIGURES, loss=math.nan, expected_loss=None)))
    figures = recorded_figures(record)
    assert figures is not None
    assert math.isnan(figures.loss)
    assert figures.expected_loss is None


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

"""What ``--loss`` and its numbers may say, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training.objective import (
    LOSS_TRAITS,
    LOSSES_NOT_HERE,
    NAMES_ELSEWHERE,
    LossSettings,
    beta_warnings,
    resolve_objective,
)


def test_each_loss_brings_its_own_beta() -> None:
    betas = {name: resolve_objective(name).lead.beta for name in LOSS_TRAITS}
    assert betas["dpo"] == 0.1
    assert betas["dpo_norm"] == 5.0
    assert betas["simpo"] == 2.0
    assert betas["sppo_hard"] == 1e-3
    assert not [warning for name in LOSS_TRAITS for warning in beta_warnings(resolve_objective(name))]


def test_a_weighted_sum_names_weights_and_betas() -> None:
    assert resolve_objective("dpo_norm=1.0, ipo:0.2=0.5,hinge", beta=3.0).losses == (
        LossSettings(name="dpo_norm", beta=3.0, weight=1.0),
        LossSettings(name="ipo", beta=0.2, weight=0.5),
        LossSettings(name="hinge", beta=3.0),
    )
    assert [loss.beta for loss in resolve_objective("dpo_norm=1.0,ipo=0.2").losses] == [5.0, 0.1]


def test_the_first_loss_with_a_reference_gives_the_unit_of_what_is_logged() -> None:
    assert resolve_objective("simpo,dpo").lead.name == "dpo"
    assert resolve_objective("ipo,dpo").averages
    assert not resolve_objective("dpo,ipo").averages
    assert not resolve_objective("simpo").uses_reference


def test_smoothing_has_a_default_only_where_a_loss_needs_it() -> None:
    assert resolve_objective("exo_pair").lead.label_smoothing == 1e-3
    assert resolve_objective("dpo").lead.label_smoothing == 0.0
    with pytest.raises(DpoCacheError, match="--label-smoothing is 0, but --loss exo_pair is not defined without it"):
        resolve_objective("exo_pair", label_smoothing=0.0)


@pytest.mark.parametrize(("name", "beta"), [("dpo_norm", 0.1), ("dpo", 5.0), ("simpo", 0.1), ("robust", 2.0)])
def test_a_beta_of_the_other_unit_is_warned_about(name: str, beta: float) -> None:
    (warning,) = beta_warnings(resolve_objective(name, beta=beta))
    assert f"--beta {beta:g} looks wrong for --loss {name}" in warning


@pytest.mark.parametrize(
    ("text", "numbers", "message"),
    [
        ("dop", {}, "unknown --loss dop"),
        ("", {}, "unknown --loss ''"),
        ("dpo=1=2", {}, "unknown --loss dpo=1=2"),
        ("dpo=x", {}, "the weight of --loss dpo=x is x"),
        ("dpo,ipo=-1", {}, "the weight of --loss ipo=-1 is -1"),
        ("dpo:0", {}, "the beta of --loss dpo:0 is 0"),
        ("dpo", {"beta": -1.0}, r"--beta is -1\.0"),
        ("dpo:0.1,ipo:0.2", {"beta": 0.3}, "--beta has no effect with --loss dpo:0.1,ipo:0.2"),
        ("dpo", {"gamma_beta_ratio": 0.5}, "--gamma-beta-ratio has no effect without --loss simpo"),
        ("ipo", {"label_smoothing": 0.1}, "--label-smoothing is not defined for --loss ipo"),
        ("dpo,apo_zero", {"label_smoothing": 0.1}, "--label-smoothing is not defined for --loss apo_zero"),
        ("robust", {"label_smoothing": 0.5}, r"--label-smoothing is 0\.5"),
        ("dpo_norm", {"f_divergence": "js"}, "--f-divergence js is not defined for --loss dpo_norm"),
        ("bco_pair", {"f_divergence": "forward_kl"}, "--f-divergence forward_kl is not defined for --loss bco_pair"),
        ("dpo", {"f_divergence": "tv"}, "unknown --f-divergence tv"),
        ("dpo", {"f_alpha": 0.3}, "--f-alpha has no effect without --f-divergence alpha"),
        ("dpo", {"f_divergence": "alpha", "f_alpha": 1.0}, r"--f-alpha is 1\.0"),
        ("dpo_norm", {"ld_alpha": 0.5}, "--ld-alpha is not defined for --loss dpo_norm"),
        ("dpo", {"ld_alpha": 1.5}, r"--ld-alpha is 1\.5"),
        ("dpo", {"nll_coef": -0.1}, r"--nll-coef is -0\.1"),
    ],
)
def test_what_is_wrong_is_named(text: str, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(DpoCacheError, match=message):
        resolve_objective(text, **numbers)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("sigmoid", "dpo"), ("sigmoid_norm", "dpo_norm"), ("dop_norm", "dpo_norm"), ("appo_zero", "apo_zero")],
)
def test_a_loss_by_another_name_is_answered_with_ours(written: str, meant: str) -> None:
    with pytest.raises(DpoCacheError, match=f"unknown --loss {written}") as refused:
        resolve_objective(written)
    assert refused.value.next_step == f"did you mean {meant}?"


def test_a_resumed_run_compares_plain_json() -> None:
    objective = resolve_objective("dpo=1,exo_pair=0.5", f_divergence="alpha", ld_alpha=0.5, nll_coef=0.1)
    assert json.loads(json.dumps(objective.to_json())) == objective.to_json()
    assert objective.summary() == (
        "1 x dpo, beta 0.1; 0.5 x exo_pair, beta 0.1, label smoothing 0.001; f-divergence alpha 0.5; LD alpha 0.5; "
        "plus 0.1 x NLL of the chosen response"
    )
    assert resolve_objective("dpo_norm").summary() == "dpo_norm, beta 5"


def test_the_settings_of_training_need_no_pytorch() -> None:
    code = (
        "import sys, dpo_cache.stages.training.train_config; "
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("written", "reason", "next_step"),
    [
        ("kto", "only losses on pairs", "bco_pair and apo_zero"),
        ("tr_dpo", "changes the reference", "with the trained model as the reference"),
        ("TR-DPO", "changes the reference", "with the trained model as the reference"),
        ("orpo", "uses no reference", "simpo"),
        ("dpo=1,sft=0.2", "a term beside a preference loss", "--nll-coef"),
        ("online_dpo", "samples responses", "train in rounds"),
    ],
)
def test_a_loss_that_a_cache_does_not_serve_is_refused_with_the_reason(
    written: str, reason: str, next_step: str
) -> None:
    with pytest.raises(DpoCacheError, match="there is no --loss") as refused:
        resolve_objective(written)
    assert reason in refused.value.found
    assert next_step in str(refused.value.next_step)


def test_no_loss_is_both_known_and_unknown() -> None:
    assert not LOSS_TRAITS.keys() & (LOSSES_NOT_HERE.keys() | NAMES_ELSEWHERE.keys())
    assert not LOSSES_NOT_HERE.keys() & NAMES_ELSEWHERE.keys()
    assert set(NAMES_ELSEWHERE.values()) <= LOSS_TRAITS.keys()

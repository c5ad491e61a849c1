"""QLoRA from command to files: a reference scored in nf4, a policy trained on it, and what does not fit together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import dpo_cache, dpo_train, metrics, run, shard_rows
from dpo_cache import cli
from peft import PeftModel
from quantized_model import plainly_quantized
from tiny_model import plain_logps

RECIPE = ("--global-batch-size", 8, "--learning-rate", 5e-3, "--warmup-ratio", 0, "--max-steps", 4, "--lora-rank", 4)


@pytest.fixture(scope="module")
def quantized_cache(tmp_path_factory: pytest.TempPathFactory, reference: Path, pairs_file: Path) -> Path:
    """The forty pairs, scored by the reference in nf4."""
    cache = tmp_path_factory.mktemp("quantized") / "cache"
    run(
        dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache, "--quantization", "nf4"),
    )
    return cache


@torch.no_grad()
def sums(model: Any, row: dict[str, Any]) -> tuple[float, float]:
    """The log-probabilities of both answers: one row, no mask, full logits."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
        token_logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(float(token_logps[len(row["prompt_ids"]) - 1 :].double().sum()))
    return found[0], found[1]


def test_a_cache_holds_what_the_quantized_model_says_and_says_so(quantized_cache: Path, reference: Path) -> None:
    identity = json.loads((quantized_cache / "cache.json").read_text())["identity"]
    assert identity["quantization"] == "nf4"
    assert "nf4" in CliRunner().invoke(cli.dpo_cache, ["info", str(quantized_cache)]).stdout
    model = plainly_quantized(reference)
    from_full_weights = []
    for row in shard_rows(quantized_cache).to_pylist()[:8]:
        cached = (row["ref_chosen_logps"], row["ref_rejected_logps"])
        assert sums(model, row) == pytest.approx(cached, rel=1e-5)
        full = plain_logps(reference, row["prompt_ids"], row["chosen_ids"])
        from_full_weights.append(abs(full / cached[0] - 1))
    # One answer may hardly move: the errors of its tokens cancel out.
    assert fmean(from_full_weights) > 1e-3
    again = CliRunner().invoke(cli.dpo_cache, ["verify", str(quantized_cache), "--rescore", "8", "--json"])
    assert again.exit_code == 0, again.output
    assert max(spread["max_per_token"] for spread in json.loads(again.stdout)["rescored"]["spreads"]) < 1e-5


def test_a_policy_starts_at_the_quantized_reference_and_its_adapter_gives_it_back(
    quantized_cache: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    how = ("--use-qlora", "--zero-stage", 1, "--num-gpus", 2, "--gradient-checkpointing", "--eval-mixture", "train")
    report = run(dpo_train("--cache", quantized_cache, "--output", output, *RECIPE, *how))
    assert report["step0"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert report["step0"]["max_per_token"] < 1e-5
    losses = [line["train_loss"] for line in metrics(output)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    assert json.loads((output / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(reference)

    policy = PeftModel.from_pretrained(plainly_quantized(reference), output / "model").train()
    rows = {row["example_key"].hex(): row for row in shard_rows(quantized_cache).to_pylist()}
    for line in map(json.loads, (output / "eval_margins.jsonl").read_text().splitlines()[:8]):
        row = rows[line["key"]]
        chosen, rejected = sums(policy, row)
        chosen = (chosen - row["ref_chosen_logps"]) / row["chosen_tokens"]
        rejected = (rejected - row["ref_rejected_logps"]) / row["rejected_tokens"]
        assert line["rewards/margin"] == pytest.approx(5 * (chosen - rejected), rel=1e-4, abs=1e-4)


def refusal(*arguments: str | Path) -> str:
    """The message with which ``dpo-train`` ends."""
    done = CliRunner().invoke(cli.dpo_train, list(map(str, arguments)))
    assert done.exit_code == 1, done.exception
    return done.stderr[done.stderr.index("Error: ") :]


def test_policy_and_reference_have_to_be_quantized_alike(
    quantized_cache: Path, shared_cache: Path, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "run", "--zero-stage", "2")
    for more in ((), ("--use-lora",)):
        message = refusal("--cache", quantized_cache, *output, *more)
        assert "(quantization: cache nf4, policy None)" in message
        assert "add --use-qlora" in message
    message = refusal("--cache", shared_cache, *output, "--use-qlora")
    assert "(quantization: cache None, policy nf4)" in message
    assert "--quantization nf4, or add --allow-numerics-mismatch" in message


def test_a_mismatch_that_was_asked_for_trains_and_says_how_far_apart_they_are(
    shared_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    how = ("--use-qlora", "--zero-stage", "0", "--merge", "--allow-numerics-mismatch")
    arguments = map(str, ("--cache", shared_cache, "--output", output, *RECIPE, *how))
    done = CliRunner().invoke(cli.dpo_train, list(arguments))
    assert done.exit_code == 0, done.output
    assert "warning: before any update, policy and cached reference differ by" in done.stderr
    step_zero = json.loads((output / "step0.json").read_text())
    assert not step_zero["within_bound"]
    assert "quantization_config" not in json.loads((output / "model/config.json").read_text())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--zero-stage", "3"), "cannot partition quantized weights"),
        (("--adapter", "somewhere"), "is given with --adapter"),
    ],
)
def test_a_reference_that_no_policy_could_start_at_is_refused(
    reference: Path, pairs_file: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    arguments = ("build", "--model", reference, "--dataset", pairs_file, "--cache", tmp_path / "cache")
    done = CliRunner().invoke(cli.dpo_cache, [*map(str, arguments), "--quantization", "nf4", *more])
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (tmp_path / "cache").exists()

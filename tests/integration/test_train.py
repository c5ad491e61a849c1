"""Stage two on real processes: the proof at step 0, plain PyTorch, ranks, resuming, the saved model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import dpo_cache, dpo_train, ended, fails, kill_when, metrics, run
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.example_key import key_at
from safetensors.torch import load_file
from tiny_model import message_pairs, plain_logps, write_rows, write_tiny_model
from torch.nn.functional import logsigmoid
from training_order import pairs_in_training_order
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8
RECIPE = ("--global-batch-size", BATCH, "--learning-rate", 1e-3, "--tokens-per-microbatch", 128)
ADAM = ("--adam-beta1", 0.8, "--adam-beta2", 0.95, "--adam-epsilon", 1e-6)  # not the defaults: they have to arrive
LEARNING = ("train_loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "logps/chosen", "grad_norm")


def train(cache: Path, output: Path, *more: str | Path | int | float) -> list[str]:
    return dpo_train("--cache", cache, "--output", output, *RECIPE, *more)


# ---- against plain PyTorch -------------------------------------------------------------------------------------


def plainly_trained(
    model: Any, batches: list[list[dict[str, Any]]], rates: list[float], beta: float
) -> list[dict[str, float]]:
    """Length-normalised DPO in plain PyTorch: one row at a time, full logits, AdamW as in ``ADAM``, clipping at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.8, 0.95), eps=1e-6)
    lines = []
    for rows, rate in zip(batches, rates, strict=True):
        losses, rewards = [], []
        for row in rows:
            sides = []
            for side in ("chosen", "rejected"):
                ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                policy = logps[len(row["prompt_ids"]) - 1 :].mean()
                sides.append(beta * (policy - row[f"ref_{side}_logps"] / row[f"{side}_tokens"]))
            losses.append(-logsigmoid(sides[0] - sides[1]))
            rewards.append([side.item() for side in sides])
        loss = torch.stack(losses).mean()
        torch.autograd.backward(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = np.mean(rewards, axis=0)
        lines.append(
            {
                "train_loss": float(loss.detach()),
                "grad_norm": float(grad_norm),
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margin": chosen - rejected,
            }
        )
    return lines


def test_ten_updates_equal_plain_pytorch_on_one_rank_and_on_two(
    shared_cache: Path, reference: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / "one", tmp_path / "two"]
    for ranks, output in enumerate(outputs, start=1):
        report = run(train(shared_cache, output, *ADAM, "--max-steps", 10, "--num-gpus", ranks))
        assert report["step0"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    one, two = map(metrics, outputs)
    assert [line["training_step"] for line in one] == list(range(1, 11))

    model = AutoModelForCausalLM.from_pretrained(reference)
    batches = pairs_in_training_order(shared_cache, 10, global_batch_size=BATCH)
    plain = plainly_trained(model, batches, [line["learning_rate"] for line in one], beta=5.0)
    for ours, others, expected in zip(one, two, plain, strict=True):
        for field, value in expected.items():
            assert ours[field] == pytest.approx(value, rel=1e-4, abs=1e-4), (ours["training_step"], field)
            assert others[field] == pytest.approx(value, rel=1e-4, abs=1e-4), (ours["training_step"], field)
    assert one[-1]["train_loss"] < 0.6  # it has learned: ten times ln 2 would prove nothing
    saved = AutoModelForCausalLM.from_pretrained(outputs[1] / "model")
    for (name, ours_after), plainly_after in zip(saved.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours_after, plainly_after, rtol=1e-3, atol=2e-4, msg=name)


def test_another_policy_than_the_reference_begins_as_in_plain_pytorch_once_it_is_allowed(
    shared_cache: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=5)
    away = ("--model", other, "--allow-other-policy", "--max-steps", 1)
    run(train(shared_cache, tmp_path / "run", *ADAM, *away))
    (line,) = metrics(tmp_path / "run")
    batches = pairs_in_training_order(shared_cache, 1, global_batch_size=BATCH)
    model = AutoModelForCausalLM.from_pretrained(other)
    (plain,) = plainly_trained(model, batches, [line["learning_rate"]], beta=5.0)
    assert abs(plain["rewards/margin"]) > 1e-2  # a wrong sign would show
    for field, value in plain.items():
        assert line[field] == pytest.approx(value, rel=1e-4, abs=1e-4), field


COUNTING = """
import sys
from dpo_cache.pipeline.scoring.pair_scorer import PairScorer
from dpo_cache.stages.training.training_loop import TrainingLoop
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, LlamaModel

loaded, load = [], AutoModelForCausalLM.from_pretrained
AutoModelForCausalLM.from_pretrained = lambda path, **options: loaded.append(str(path)) or load(path, **options)
forwards, before_loop = [], []
register_module_forward_pre_hook(lambda module, inputs: forwards.append(1) if isinstance(module, LlamaModel) else None)
make = TrainingLoop.__init__
TrainingLoop.__init__ = lambda *given: before_loop.append(len(forwards)) or make(*given)
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:], standalone_mode=False)
print(loaded, len(forwards) - before_loop[0])
"""


def as_script(program: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command of ``dpo-train``, run by a program that changes something first."""
    arguments = command[command.index("train") + 1 :]
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


def test_a_run_loads_the_policy_alone_and_scores_the_first_batch_the_updates_and_the_evaluations(
    shared_cache: Path, reference: Path, tmp_path: Path
) -> None:
    whole_batches = ("--tokens-per-microbatch", 4096)
    command = train(shared_cache, tmp_path / "run", "--max-steps", 2, "--eval-mixture", "train", *whole_batches)
    done = as_script(COUNTING, command)
    assert done.returncode == 0, done.stderr
    evaluations = 2 * 40 // BATCH  # before the first update and after the last
    assert done.stdout.splitlines()[-1] == f"['{reference}'] {1 + 2 + evaluations}"
    assert re.search(
        r"\nbefore any update, policy and cached reference differ by [\d.e-]+ nats per token \(mean [\d.e-]+\) "
        r"on the 8 pairs of the first batch; its loss is 0\.69314\d\n",
        done.stderr,
    )
    changed = re.findall(
        r"\nupdate 1, with learning rate 0.001, changed ([\d.]+)% of the float32 weights; ", done.stderr
    )
    assert len(changed) == 1
    assert float(changed[0]) > 50


FULL_DISK = """
import shutil, sys
from types import SimpleNamespace

shutil.disk_usage = lambda folder: SimpleNamespace(total=1000, free=1000)
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


def test_a_run_that_would_fill_the_disk_is_refused_before_its_first_update(shared_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    keeping = ("--max-steps", 9, "--checkpointing-steps", 2, "--keep-last-n-checkpoints", -1)
    done = as_script(FULL_DISK, train(shared_cache, output, *keeping))
    assert done.returncode == 1, done.stderr
    assert f"Error: {output} has 0.0 GiB free" in done.stderr
    assert "for 5 more checkpoints and 1 more model" in done.stderr
    assert not (output / "step0.json").exists()


def test_a_sum_with_a_loss_that_sorts_the_global_batch_does_not_depend_on_the_ranks(
    shared_cache: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / "one", tmp_path / "two"]
    losses = ("--loss", "aot=1.0,aot_unpaired=0.5,dpo:0.2=0.5", "--nll-coef", 0.01, "--ld-alpha", 0.5)
    options = (*losses, "--max-steps", 4, "--eval-mixture", "train")
    held_out = []
    for ranks, output in enumerate(outputs, start=1):
        report = run(train(shared_cache, output, *options, "--num-gpus", ranks))
        held_out.append([report["eval_after"][f"eval/{field}"] for field in ("loss", "rewards/margin", "logps/chosen")])
        likelihood = -metrics(output)[0]["logps/chosen_per_token"]
        assert report["step0"]["loss"] == pytest.approx(2 * math.log(2) + 0.01 * likelihood, abs=1e-5)
        assert report["step0"]["expected_loss"] is None
    for ours, others in zip(*map(metrics, outputs), strict=True):
        for field in LEARNING:
            assert ours[field] == pytest.approx(others[field], rel=1e-4, abs=1e-5), (ours["training_step"], field)
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4, abs=1e-5)


def content_of(folder: Path) -> dict[Path, bytes]:
    """Every file of a run but the one that says which process has it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


# ---- resuming --------------------------------------------------------------------------------------------------


def test_a_run_killed_and_resumed_equals_one_never_stopped(shared_cache: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    schedule = ("--max-steps", 20, "--checkpointing-steps", 7, "--lr-scheduler-type", "cosine")
    between_two_lines = ("--logging-steps", 2, "--eval-mixture", "train")
    options = (*schedule, *between_two_lines, "--num-gpus", 2)
    run(train(shared_cache, whole, *options))
    complete = killed / "checkpoints/step_7/COMPLETE"
    assert kill_when(train(shared_cache, killed, *options), complete.exists)
    assert len(metrics(killed)) >= 3
    assert not (killed / "model").exists()
    report = run(train(shared_cache, killed, *options, "--resume"))
    assert (report["steps"], report["pairs"]) == (20, 160)
    again = run(train(shared_cache, killed, *options, "--resume"))  # nothing is left to do
    assert (again["steps"], again["pairs"]) == (20, 160)
    assert again["last"] == report["last"]
    assert again["eval_after"] == report["eval_after"]
    straight, resumed = metrics(whole), metrics(killed)
    assert [line["training_step"] for line in resumed] == list(range(2, 21, 2))
    written = (killed / "metrics.jsonl").read_text().splitlines()
    assert [line["training_step"] for line in map(json.loads, written) if "eval/loss" in line] == [0, 20]
    for ours, theirs in zip(resumed, straight, strict=True):
        for field in (*LEARNING, "learning_rate", "epoch"):
            assert ours[field] == pytest.approx(theirs[field], rel=1e-9), (ours["training_step"], field)
    ours_after, theirs_after = (load_file(folder / "model/model.safetensors") for folder in (killed, whole))
    for name, weight in theirs_after.items():
        torch.testing.assert_close(ours_after[name], weight, rtol=0, atol=0)


SIGTERM_WHILE_EVALUATING = """
import signal, sys
from dpo_cache.stages.training.training_loop import TrainingLoop

evaluate = TrainingLoop.evaluate
def evaluate_until_told(loop, updates_done, is_to_stop):
    asked = []
    def is_told():
        asked.append(1)
        if updates_done == 2 and len(asked) == 2:  # between two batches
            signal.raise_signal(signal.SIGTERM)
        return is_to_stop()
    return evaluate(loop, updates_done, is_told)

TrainingLoop.evaluate = evaluate_until_told
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


EVALUATED = ("--max-steps", 3, "--eval-mixture", "train", "--eval-steps", 1, "--keep-best", "margin")


def without_speed(run_folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if "perf/" not in name} for line in lines]


def test_a_run_told_to_stop_while_it_evaluates_saves_at_once_and_makes_up_for_the_evaluation(
    shared_cache: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    report = run(train(shared_cache, whole, *EVALUATED))
    saved = []
    for resumed in ((), ("--resume",)):  # the second is told so while it makes up for the evaluation
        told = as_script(SIGTERM_WHILE_EVALUATING, train(shared_cache, stopped, *EVALUATED, *resumed))
        assert told.returncode == 1
        assert "the checkpoint after update 2 of 3 is saved" in told.stderr
        saved.append((stopped / "checkpoints/step_2/COMPLETE").stat().st_mtime_ns)
    assert saved[0] == saved[1]
    assert run(train(shared_cache, stopped, *EVALUATED, "--resume"))["best"] == report["best"]
    assert without_speed(stopped) == without_speed(whole)


KILLED_BEFORE_THE_BEST_IS_KEPT = """
import os, signal, sys
from dpo_cache.stages.training.training_updates import TrainingUpdates

keep = TrainingUpdates._keep_best
def killed(updates, line, evaluation):
    if evaluation["training_step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(updates, line, evaluation)

TrainingUpdates._keep_best = killed
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


def test_a_run_killed_between_its_best_evaluation_and_the_best_model_keeps_it_once_it_is_resumed(
    shared_cache: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*EVALUATED, "--keep-best", "accuracy", "--learning-rate", 0.1, "--checkpointing-steps", 1)
    report = run(train(shared_cache, whole, *options))
    assert report["best"]["training_step"] == 2  # the third update can only equal it
    died = as_script(KILLED_BEFORE_THE_BEST_IS_KEPT, train(shared_cache, killed, *options))
    assert died.returncode == -signal.SIGKILL
    assert json.loads((killed / "best.json").read_text(encoding="utf-8"))["training_step"] == 1
    assert run(train(shared_cache, killed, *options, "--resume"))["best"] == report["best"]
    best = [(folder / "best/model.safetensors").read_bytes() for folder in (whole, killed)]
    assert best[0] == best[1]
    assert best[0] != (whole / "model/model.safetensors").read_bytes()  # it is the model of that update
    assert without_speed(killed) == without_speed(whole)


KILLED_BEFORE_THE_LAST_MARGINS_ARE_WRITTEN = """
import os, signal, sys
from dpo_cache.stages.training import training_updates

write = training_updates.write_eval_margins
def killed(path, *, training_step, **margins):
    if training_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, training_step=training_step, **margins)

training_updates.write_eval_margins = killed
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


def test_a_run_killed_before_the_last_margins_are_written_writes_them_once_it_is_resumed(
    shared_cache: Path, tmp_path: Path
) -> None:
    command = train(shared_cache, tmp_path / "run", *EVALUATED)
    assert as_script(KILLED_BEFORE_THE_LAST_MARGINS_ARE_WRITTEN, command).returncode == -signal.SIGKILL
    run([*command, "--resume"])
    evaluations = [line["training_step"] for line in without_speed(tmp_path / "run") if "eval/loss" in line]
    assert evaluations == [0, 1, 2, 3]
    margins = (tmp_path / "run/eval_margins.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["training_step"] for line in margins} == {3}


def test_a_finished_run_without_checkpoints_is_not_trained_again(shared_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    noisy = ("--model", write_tiny_model(tmp_path / "noisy", attention_dropout=0.5))  # else the reference
    run(train(shared_cache, output, *noisy, "--max-steps", 1))
    command = train(shared_cache, output, *noisy, "--max-steps", 1, "--resume")
    again = ended(command)
    assert again.returncode == 0, again.stderr
    assert "\nthe model's dropout (attention_dropout 0.5) is off, because the reference" in again.stderr
    assert "step_1; all updates are done" in again.stderr
    assert "\nupdates        1 in all, 5 per epoch\n" in again.stderr  # the resolved settings, as of --plan
    assert re.search(
        r"\nhost memory after loading: [\d.]+ [MG]iB at most on a rank, [\d.]+ [MG]iB over all ranks\n", again.stderr
    )
    shutil.rmtree(output / "checkpoints")
    model = (output / "model/model.safetensors").stat().st_mtime_ns
    assert f"the run in {output} is finished, and its checkpoints are gone" in fails(command)
    assert (output / "model/model.safetensors").stat().st_mtime_ns == model


def test_resuming_on_one_rank_instead_of_two_goes_on_at_the_next_pair(shared_cache: Path, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    options = ("--max-steps", 6, "--checkpointing-steps", 3)
    run(train(shared_cache, straight, *options, "--num-gpus", 1))
    complete = moved / "checkpoints/step_3/COMPLETE"
    assert kill_when(train(shared_cache, moved, *options, "--num-gpus", 2), complete.exists)
    run(train(shared_cache, moved, *options, "--num-gpus", 1, "--resume"))
    for ours, theirs in zip(metrics(moved), metrics(straight), strict=True):
        for field in LEARNING:
            assert ours[field] == pytest.approx(theirs[field], rel=1e-4, abs=1e-5), (ours["training_step"], field)


RECORDING_TRACKER = """
from pathlib import Path

class Run:
    def __init__(self, id):
        self.id = id

    def log(self, line, step):
        pass

    def finish(self):
        pass

def init(*, dir, id, **_):
    with (Path(dir) / "asked-for").open("a") as asked_for:
        print(id, file=asked_for)
    return Run(id or "first")
"""


def with_tracker(folder: Path, module: str) -> dict[str, str]:
    """An environment in which this stands in for wandb."""
    folder.mkdir()
    (folder / "wandb.py").write_text(module)
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def test_models_saved_between_are_those_of_shorter_runs(shared_cache: Path, tmp_path: Path) -> None:
    steady = ("--lr-scheduler-type", "constant", "--warmup-ratio", 0)
    saving = ("--max-steps", 4, "--model-saving-steps", 2, *steady)
    shorter, longer = tmp_path / "shorter", tmp_path / "longer"
    run(train(shared_cache, shorter, "--max-steps", 2, *steady))
    run(train(shared_cache, longer, *saving, "--stop-after-steps", 2))
    assert not (longer / "model").exists()
    between, ended = longer / "models/step_2", shorter / "model"
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (between / file).read_bytes() == (ended / file).read_bytes()
    run(train(shared_cache, longer, *saving, "--resume"))
    assert [path.name for path in (longer / "models").iterdir()] == ["step_2"]  # the last one is the model itself
    assert (longer / "model/model.safetensors").read_bytes() != (between / "model.safetensors").read_bytes()


def test_going_on_from_an_earlier_checkpoint_removes_the_later_ones_and_continues_the_trackers_curve(
    shared_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    environment = with_tracker(tmp_path / "modules", RECORDING_TRACKER)
    options = ("--max-steps", 8, "--checkpointing-steps", 1, "--keep-last-n-checkpoints", 3, "--with-tracking")
    run(train(shared_cache, output, *options, "--stop-after-steps", 4), environment=environment)
    back = ("--resume", output / "checkpoints/step_2", "--stop-after-steps", 3)
    run(train(shared_cache, output, *options, *back), environment=environment)
    assert (output / "asked-for").read_text().split() == ["None", "first"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert [line["training_step"] for line in metrics(output)] == [1, 2, 3]


def test_a_checkpoint_from_elsewhere_begins_a_new_run_and_replaces_no_other(shared_cache: Path, tmp_path: Path) -> None:
    ours, theirs, copy = tmp_path / "ours", tmp_path / "theirs", tmp_path / "copy"
    options = ("--max-steps", 2, "--checkpointing-steps", 1)
    run(train(shared_cache, ours, *options, "--beta", 5))
    run(train(shared_cache, theirs, *options, "--beta", 10))
    before = content_of(theirs)
    resume = ("--beta", 5, "--resume", ours / "checkpoints/step_1")
    message = fails(train(shared_cache, theirs, *options, *resume))
    assert f"--output {theirs} holds another run than that of {ours / 'checkpoints/step_1'}: " in message
    assert "loss.losses.0.beta was 10.0 and is 5.0" in message
    assert content_of(theirs) == before

    for _ in range(2):  # the same command also where it has been before
        report = run(train(shared_cache, copy, *options, *resume))
        assert (report["steps"], report["pairs"]) == (2, 16)
        # What counts as a tie depends on it, so the accuracies are those of the run that was begun elsewhere.
        assert report["step0"] == json.loads((ours / "summary.json").read_text())["step0"]
    assert [line["training_step"] for line in metrics(copy)] == [2]
    assert (copy / "step0.json").read_bytes() == (ours / "step0.json").read_bytes()


# ---- what a run leaves -----------------------------------------------------------------------------------------


def test_a_run_evaluates_logs_and_saves_a_model_that_loads(reference: Path, tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True, dtype=torch.bfloat16)
    config = json.loads((tied / "config.json").read_text(encoding="utf-8"))
    del config["use_cache"], config["attention_dropout"]  # left to their defaults, as older checkpoints do
    (tied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, rows in (("train", message_pairs(20)), ("held-out", message_pairs(11, seed=3))):
        dataset = write_rows(tmp_path / f"{name}.jsonl", rows)
        command = ("--model", tied, "--dataset", dataset, "--mixture", name, "--cache", tmp_path / "cache")
        run(dpo_cache("build", *command, "--dtype", "bfloat16", "--chat-template", "tulu"))
    output = tmp_path / "run"
    evaluated = ("--eval-mixture", "held-out", "--eval-steps", 2, "--num-gpus", 2, "--activation-memory-budget", 0.5)
    kept = ("--keep-best", "margin")
    report = run(train(tmp_path / "cache", output, *evaluated, *kept, "--num-train-epochs", 2, "--warmup-ratio", 0.5))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["training_step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 6]
    steps = [line for line in lines if "train_loss" in line]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [line["epoch"] for line in steps] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    assert report["eval_before"]["eval/rewards/accuracy"] == 0.5
    margins = [json.loads(line) for line in (output / "eval_margins.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = ReferenceCache.open(tmp_path / "cache")
    held_out = trained.read_mixture("held-out").rows().example_keys
    assert [line["key"] for line in margins] == [key_at(held_out, row).hex() for row in range(11)]
    assert {line["training_step"] for line in margins} == {6}
    mean = sum(line["rewards/margin"] for line in margins) / len(margins)
    assert mean == pytest.approx(report["eval_after"]["eval/rewards/margin"], rel=1e-9)
    assert report["step0"]["max_per_token"] < 3e-2
    record = json.loads((output / "step0.json").read_text(encoding="utf-8"))
    assert {**record, **report["step0"]} == record
    assert record["reference_id"] == trained.reference_id
    assert record["mixture_digest"] == trained.read_mixture("train").digest
    assert (record["dtype"], record["attention"]) == ("bfloat16", trained.identity.attention)
    assert record["policy_is_reference"]
    by_step = {line["training_step"]: line["eval/rewards/margin"] for line in lines if "eval/loss" in line}
    best = json.loads((output / "best.json").read_text(encoding="utf-8"))
    assert best["training_step"] == max((2, 4, 6), key=by_step.__getitem__)
    assert report["best"] == best
    assert (output / "best/model.safetensors").exists()
    for folder in ("best", "model"):
        tokenizer = AutoTokenizer.from_pretrained(output / folder)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        assert prompt == "<|user|>\nhello\n"
        assert json.loads((output / folder / "config.json").read_text(encoding="utf-8")) == config

    header = load_file(output / "model/model.safetensors")
    assert {weight.dtype for weight in header.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in header
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(output / "model").chat_template
    before = AutoModelForCausalLM.from_pretrained(tied)
    changed = [not torch.equal(*both) for both in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert not math.isnan(plain_logps(output / "model", [1, 2, 3], [4, 5]))


WAITING_TRACKER = """
from pathlib import Path

class Run:
    id = "r"

    def __init__(self, folder):
        self._folder = Path(folder)

    def log(self, line, step):
        pass

    def finish(self):
        saved = [(self._folder / name).exists() for name in ("model/config.json", "summary.json")]
        (self._folder / "saved-before").write_text(str(all(saved)))

def init(*, dir, **_):
    return Run(dir)
"""


def test_model_and_results_are_saved_before_a_tracker_may_wait_for_its_network(
    shared_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    environment = with_tracker(tmp_path / "modules", WAITING_TRACKER)
    run(train(shared_cache, output, "--max-steps", 1, "--with-tracking"), environment=environment)
    assert (output / "saved-before").read_text() == "True"


def test_a_plan_and_a_dry_run_train_nothing(shared_cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    plan = run(train(shared_cache, output, "--plan", "--num-gpus", 4))
    assert (plan["total_steps"], plan["global_batch_size"], plan["num_ranks"]) == (5, BATCH, 4)
    assert not output.exists()
    leave_half_written(output)
    report = run(train(shared_cache, output, "--dry-run"))
    assert report["steps"] == 5
    assert report["peak_memory_gib"] > 0
    assert {path.name for path in output.iterdir()} == {".lock", "dry-run.json"}
    leave_half_written(output)
    run(train(shared_cache, output, "--max-steps", 1))
    assert not [*output.glob("model.dry-run*"), *output.glob("*.partial")]


UNSAVABLE = """
import sys
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.training import model_export

def refuse(folder, expected):
    raise DpoCacheError(f"{len(expected)} weights are not what they should be")

model_export.check_headers = refuse
from dpo_cache.cli import dpo_train
dpo_train(sys.argv[1:])
"""


def test_a_dry_run_finds_that_the_model_cannot_be_saved(shared_cache: Path, tmp_path: Path) -> None:
    """Else that would show at the end of a run alone."""
    done = as_script(UNSAVABLE, train(shared_cache, tmp_path / "run", "--dry-run"))
    assert done.returncode == 1, done.stderr
    assert re.search(r"\nError: \d+ weights are not what they should be\n", done.stderr)


KILLED_BEFORE_SYNC = """
import os, signal, sys
from pathlib import Path
from dpo_cache.pipeline.cache import durable_file
from dpo_cache.pipeline.training.run_file import write_run_json

durable_file.operations.sync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
write_run_json(Path(sys.argv[1]) / "config.json", {})
"""


def leave_half_written(output: Path) -> None:
    """What is left of a dry run that is killed while it saves, and of a run killed while it writes a file."""
    half_saved = output / "model.dry-run.tmp"
    half_saved.mkdir(parents=True)
    (half_saved / "model.safetensors").write_bytes(b"half")
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_SYNC, output], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(output.glob("*.partial"))


AGENT = ("torchrun", "--no-python", "--nnodes", "2", "--nproc-per-node", "1", "--master-port", "29433")
LAUNCHERS = {
    "deepspeed": [["deepspeed", "--no_python", "--no_local_rank", "--num_gpus", "2", "--master_port", "29432"]],
    "two agents of torchrun": [[*AGENT, "--node-rank", str(node)] for node in range(2)],
}


@pytest.mark.parametrize("starts", LAUNCHERS.values(), ids=LAUNCHERS)
def test_other_launchers_start_the_same_ranks(
    shared_cache: Path, programs: Path, tmp_path: Path, starts: list[list[str]]
) -> None:
    folder = Path(sys.executable).parent
    command = [str(programs / "dpo-train"), *train(shared_cache, tmp_path / "run", "--max-steps", 2)[4:]]
    agents = [
        subprocess.Popen(
            [str(folder / program), *options, *command],
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for program, *options in starts
    ]
    for said, agent in [(agent.communicate(timeout=240)[1], agent) for agent in agents]:
        assert agent.returncode == 0, said[-4000:]
    assert len(metrics(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["resolved"]["num_ranks"] == 2

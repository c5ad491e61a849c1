"""Stage one on real processes and files: values, reuse, growth, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import assert_same_logps, dpo_cache, ended, fails, logps_by_key, run, shard_rows
from commands_in_process import invoke, refusal, report
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.pair_spool import PairSpool
from dpo_cache.stages.building.build_plan import ScoringPlan
from tiny_model import message_pair, message_pairs, plain_logps, rendered_pair, write_rows, write_tiny_model

from .conftest import NUM_PAIRS, real_rows


def build(reference: Path, dataset: Path | str, cache: Path, *more: str | Path | int) -> list[str]:
    return dpo_cache("build", "--model", reference, "--dataset", dataset, "--cache", cache, *more)


# ---- values ----------------------------------------------------------------------------------------------------


def test_cached_values_equal_plain_forwards_of_hand_rendered_text(
    shared_cache: Path, reference: Path, pairs_file: Path
) -> None:
    rows = shard_rows(shared_cache).to_pylist()
    cached = {tuple(row["prompt_ids"]): row for row in rows}
    for line in pairs_file.read_text(encoding="utf-8").splitlines():
        prompt, chosen, rejected = rendered_pair(reference, json.loads(line))
        row = cached[tuple(prompt)]
        assert (row["chosen_ids"], row["rejected_ids"]) == (chosen, rejected)
        assert (row["chosen_tokens"], row["rejected_tokens"]) == (len(chosen), len(rejected))
        assert row["ref_chosen_logps"] == pytest.approx(plain_logps(reference, prompt, chosen), rel=1e-5)
        assert row["ref_rejected_logps"] == pytest.approx(plain_logps(reference, prompt, rejected), rel=1e-5)


@pytest.mark.parametrize(("name", "amount", "usable"), [("hh_harmless", 400, 399), ("alpaca_eval_pairs", 100, None)])
def test_real_data_gives_the_same_values_with_1_and_3_workers_and_one_row_at_a_time(
    real_reference: Path, tmp_path: Path, name: str, amount: int, usable: int | None
) -> None:
    rows = real_rows(name)[:amount]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    one, three = tmp_path / "one", tmp_path / "three"
    for workers, cache in ((1, one), (3, three)):
        report = run(build(real_reference, dataset, cache, "--num-workers", workers))
        assert usable in (None, report["distinct_pairs"])
    assert len(logps_by_key(one)) == report["distinct_pairs"]
    assert_same_logps(logps_by_key(one), logps_by_key(three), relative=1e-5)
    for row in shard_rows(one).to_pylist()[::7]:
        for side in ("chosen", "rejected"):
            plain = plain_logps(real_reference, row["prompt_ids"], row[f"{side}_ids"])
            assert row[f"ref_{side}_logps"] == pytest.approx(plain, rel=1e-5)


def test_dropout_in_the_config_does_not_reach_the_values(shared_cache: Path, pairs_file: Path, tmp_path: Path) -> None:
    reference_with_dropout = write_tiny_model(tmp_path / "noisy", attention_dropout=0.5)
    run(build(reference_with_dropout, pairs_file, tmp_path / "cache"))
    assert_same_logps(logps_by_key(tmp_path / "cache"), logps_by_key(shared_cache), relative=0)


# ---- reuse -----------------------------------------------------------------------------------------------------


def test_the_same_build_again_runs_no_forward_and_needs_no_weights(
    cache: Path, reference: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = sorted(path.name for path in cache.rglob("*.*"))
    report = run(build(reference, pairs_file, cache))
    assert (report["pairs_scored"], report["pairs_reused"], report["reference_forwards"]) == (0, NUM_PAIRS, 0)
    assert sorted(path.name for path in cache.rglob("*.*")) == before


def test_more_rows_cost_only_themselves(cache: Path, reference: Path, pairs_file: Path, tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", message_pairs(50))  # its first forty are the cached ones
    report = run(build(reference, more, cache, "--replace"))
    assert (report["pairs_scored"], report["pairs_reused"], report["training_pairs"]) == (10, NUM_PAIRS, 50)
    others = write_rows(tmp_path / "others.jsonl", message_pairs(5, seed=9))
    for scored in (5, 0):  # extending twice adds nothing the second time
        report = run(build(reference, others, cache, "--extend"))
        assert (report["pairs_scored"], report["training_pairs"]) == (scored, 55)


def test_a_pair_that_stands_in_the_data_twice_is_scored_once_and_trained_on_twice(
    reference: Path, tmp_path: Path
) -> None:
    rows = message_pairs(6)
    twice = write_rows(tmp_path / "twice.jsonl", [*rows, *rows[::2]])
    report = run(build(reference, twice, tmp_path / "cache"))
    assert (report["pairs_scored"], report["distinct_pairs"], report["training_pairs"]) == (6, 6, 9)
    assert len(logps_by_key(tmp_path / "cache")) == 6


def test_row_order_batch_size_and_number_of_workers_change_no_key_and_no_mixture(
    shared_cache: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    lines = pairs_file.read_text(encoding="utf-8").splitlines()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(np.random.default_rng(0).permutation(lines)) + "\n", encoding="utf-8")
    cache = tmp_path / "cache"
    run(build(reference, shuffled, cache, "--num-workers", 2, "--tokens-per-batch", 64))
    assert_same_logps(logps_by_key(cache), logps_by_key(shared_cache), relative=1e-5)
    digests = [json.loads((folder / "mixtures/train.json").read_text())["digest"] for folder in (cache, shared_cache)]
    assert digests[0] == digests[1]


def test_a_dry_run_counts_and_writes_nothing(reference: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = run(build(reference, pairs_file, tmp_path / "none", "--dry-run"))
    assert (report["pairs_scored"], report["pairs_reused"], report["reference_forwards"]) == (NUM_PAIRS, 0, 0)
    assert not (tmp_path / "none").exists()


def test_a_build_shows_what_the_chat_template_renders_before_it_scores(
    reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    said = ended(build(reference, pairs_file, tmp_path / "none", "--dry-run")).stderr
    rendered = "'<|user|>question<|assistant|>answer<|endoftext|>'"
    assert f"the chat template renders a question and an answer as {rendered}" in said


def test_files_of_a_folder_that_no_split_takes_are_warned_of(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, name in enumerate(("hh.jsonl", "alpaca_eval.jsonl")):
        write_rows(folder / name, message_pairs(3, seed=number))
    done = ended(build(reference, folder, tmp_path / "cache", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert f"warning: {folder}: in none of its splits, so not read: hh.jsonl; a folder is split" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixture", "a/b"], "'a/b' cannot name a mixture"),
        (["--cache", "{reference}"], "is not a cache and not empty"),
        (["--cache", "{pairs}"], "cannot be a cache"),
        (["--dataset", "{pairs},amount=10"], "has 40 training pairs, this build makes 10"),
    ],
)
def test_a_dry_run_refuses_what_the_build_would_refuse(
    reference: Path, pairs_file: Path, shared_cache: Path, options: list[str], message: str
) -> None:
    given = {"--model": str(reference), "--dataset": str(pairs_file), "--cache": str(shared_cache)}
    option, value = options
    given[option] = value.format(reference=reference, pairs=pairs_file)
    assert message in refusal("build", *[word for pair in given.items() for word in pair], "--dry-run")


def test_two_mixtures_of_one_cache_share_their_rows(cache: Path, reference: Path, pairs_file: Path) -> None:
    report = run(build(reference, f"{pairs_file},amount=15", cache, "--mixture", "small"))
    assert (report["pairs_scored"], report["pairs_reused"], report["training_pairs"]) == (0, 15, 15)
    assert run(dpo_cache("info", cache))["mixtures"].keys() == {"small", "train"}


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--zero-stage", 3]], ids=["whole", "partitioned"])
def test_another_models_weights_are_refused_even_under_the_same_path(
    cache: Path, reference: Path, pairs_file: Path, tmp_path: Path, more: list[str | int]
) -> None:
    overwritten = tmp_path / "model"
    shutil.copytree(reference, overwritten)
    write_tiny_model(overwritten, seed=1)
    message = fails(build(overwritten, pairs_file, cache, *more))
    assert "holds the values of another reference (weights_sha256:" in message


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [("--dtype", "bfloat16", "compute_dtype: cached 'float32'"), ("--attn-implementation", "eager", "attention: ")],
)
def test_other_numerics_are_refused_by_name(
    cache: Path, reference: Path, pairs_file: Path, option: str, value: str, field: str
) -> None:
    message = fails(build(reference, pairs_file, cache, option, value))
    assert field in message
    assert "give another --cache for this reference" in message


def test_a_changed_template_makes_other_keys_and_is_named(
    cache: Path, reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}")
    changed = build(reference, pairs_file, cache, "--chat-template", template)
    message = fails(changed)
    assert re.search(r"40 are new and 40 are gone; made with other settings: chat_template \(was .*, now .*\)", message)
    assert "--replace" in message
    report = run([*changed, "--replace"])
    assert (report["pairs_scored"], report["pairs_reused"]) == (NUM_PAIRS, 0)


def test_unusable_rows_are_counted_by_reason_listed_and_refused_beyond_a_share(reference: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = message_pairs(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[7]["chosen"] = rows[7]["chosen"][:-1]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    message = fails(build(reference, dataset, tmp_path / "cache", "--verbose"))
    assert "2 of 10 rows make no pair: 1 identical-responses, 1 no-assistant-response" in message
    assert "next: mend the rows that are listed above, or accept them" in message
    too_long = fails(build(reference, write_rows(dataset, message_pairs(4)), tmp_path / "c", "--max-seq-length", "4"))
    assert "none of 4 rows makes a pair: 4 too-long" in too_long
    assert "next: raise --max-seq-length, or cut them with --truncation" in too_long
    for truncation, reason in (
        ("truncate-prompt-left", "response-too-long"),
        ("truncate-response-right", "prompt-too-long"),
    ):
        limits = ("--max-seq-length", "4", "--truncation", truncation)
        uncut = refusal(*build(reference, dataset, tmp_path / "c", *limits)[3:])
        assert f"none of 4 rows makes a pair: 4 {reason}" in uncut
        assert "next: raise --max-seq-length" in uncut
    searched = message_pairs(4)
    for row in searched:
        row["chosen"] += [{"role": "user", "content": "Really?"}, row["chosen"][-1]]
    several = fails(build(reference, write_rows(dataset, searched), tmp_path / "c"))
    assert "none of 4 rows makes a pair: 4 several-messages" in several
    assert "with --mask response-turns" in several
    write_rows(dataset, rows)
    report = run(build(reference, dataset, tmp_path / "cache", "--max-unusable-share", "0.2"))
    assert report["dropped"] == {"identical-responses": 1, "no-assistant-response": 1}
    info = run(dpo_cache("info", tmp_path / "cache"))
    assert info["mixtures"]["train"]["dropped"] == report["dropped"]


def test_a_dataset_none_of_whose_rows_make_a_pair_is_refused_however_few_they_are(
    reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    unread = message_pairs(2)
    for row in unread:
        row["chosen"][-1]["role"] = "gpt"
    dataset = write_rows(tmp_path / "unread.jsonl", unread)
    command = build(reference, pairs_file, tmp_path / "cache", "--dataset", dataset, "--max-unusable-share", 1)[3:]
    message = refusal(*command, "--dry-run")
    assert f"--dataset {dataset}: none of 2 rows makes a pair: 2 no-assistant-response" in message


def test_cut_responses_are_counted_by_side_told_recorded_and_warned_of(reference: Path, tmp_path: Path) -> None:
    long, short = "the quick brown fox jumps over a lazy dog", "watch"
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    write_rows(few, [message_pair(f"{row}?", short, f"{row}") for row in range(17)] + [message_pair("?", short, long)])
    write_rows(many, [message_pair("1!", long, short), message_pair("2!", long, f"no, {long}")])
    cache, limits = tmp_path / "cache", ("--max-seq-length", 12, "--truncation", "truncate-response-right")
    build_few = build(reference, few, cache, *limits)
    assert run(build_few)["warnings"] == []
    extend = build(reference, many, cache, *limits, "--extend")
    report = run(extend)
    assert report["truncated"] == {"chosen": 2, "either": 2, "rejected": 1}
    assert "2 of 2 rows have a response that was cut and so ends without its eos" in report["warnings"][0]
    again = invoke(*extend[3:])
    assert "cut: 2 chosen and 1 rejected responses in 2 of 2 rows" in again.output
    assert again.stderr.index("warning: 2 of 2 rows") < again.stderr.index("nothing to score")
    mixture = run(dpo_cache("info", cache))["mixtures"]["train"]
    assert [source["truncated"] for source in mixture["sources"]] == [
        {"either": 1, "rejected": 1},
        {"chosen": 2, "either": 2, "rejected": 1},
    ]
    assert mixture["truncated"] == {"chosen": 2, "either": 3, "rejected": 2}
    assert "           cut: 2 chosen and 2 rejected responses in 3 rows\n" in invoke("info", cache).output


def test_of_a_cache_where_nothing_was_cut_or_which_does_not_say_info_shows_no_cuts(shared_cache: Path) -> None:
    mixture = report("info", shared_cache)["mixtures"]["train"]
    assert (mixture["truncated"], "truncated" in mixture["sources"][0]) == ({}, False)
    assert "cut:" not in invoke("info", shared_cache).output


def test_a_folder_with_something_else_in_it_is_no_cache(reference: Path, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "is not a cache and not empty: it holds" in fails(build(reference, pairs_file, tmp_path))


def test_the_pair_that_every_worker_tries_first_is_the_longest(
    reference: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, int]] = []

    def planned(job: object, plan: ScoringPlan, *_: Any, **__: Any) -> None:
        assert plan.longest is not None
        lengths = [pair.shared_prefix_tokens for pair in PairSpool(Path(plan.spool)).read(range(plan.num_pairs))]
        tried.append((lengths[plan.longest], max(lengths)))
        raise DpoCacheError("planned")

    monkeypatch.setattr("dpo_cache.stages.build.lead_scoring", planned)
    assert "planned" in refusal(*build(reference, pairs_file, tmp_path / "cache")[3:])
    ((length, greatest),) = tried
    assert length == greatest


def test_a_number_of_workers_that_could_not_be_had_is_refused(
    pairs_file: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    command = build(reference, pairs_file, tmp_path / "cache", "--num-workers", 3)[3:]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--num-workers is 3, and this machine has 2 GPUs" in refusal(*command)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert "--num-workers is 3, but a launcher started 2 processes here" in refusal(*command)


def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_scored(
    pairs_file: Path, reference: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference)
    known = len(tokenizer)
    tokenizer.add_tokens(["yes"])  # as people do, and leave the embeddings as they are
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = build(reference, pairs_file, tmp_path / "cache", "--tokenizer", tmp_path / "tokenizer", "--dry-run")
    message = refusal(*command[3:])
    assert f"row 0 has the token id {known}, and the model has embeddings for {known} tokens" in message


@pytest.fixture
def nan_model(reference: Path, tmp_path: Path) -> Path:
    """The reference, but with no finite value for some of the pairs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference)
    model = AutoModelForCausalLM.from_pretrained(reference)
    poisoned = tokenizer("7 yes", add_special_tokens=False).input_ids[0]  # only in some pairs
    with torch.no_grad():
        model.model.embed_tokens.weight[poisoned] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    return tmp_path / "nan"


def test_a_model_that_yields_nan_names_the_pairs_and_keeps_the_rest(
    nan_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = build(nan_model, pairs_file, cache)
    message = fails(command)
    assert "no finite log-probability below zero" in message
    assert "(chosen nan, rejected " in message
    kept = len(logps_by_key(cache))
    assert 0 < kept < NUM_PAIRS
    assert not (cache / "mixtures/train.json").exists()
    report = run([*command, "--drop-nonfinite"])
    assert (report["pairs_reused"], report["training_pairs"]) == (kept, kept)
    assert report["dropped"] == {"no-finite-logps": NUM_PAIRS - kept}


def test_leaving_pairs_out_again_loads_no_model_and_changes_nothing(
    nan_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = build(nan_model, pairs_file, cache, "--drop-nonfinite")
    first = run(command)
    before = {path: path.read_bytes() for path in cache.rglob("*.*") if path.parent.name != "tmp"}
    for more in ([], ["--dry-run"], ["--extend"]):
        again = run([*command, *more])
        assert (again["pairs_scored"], again["reference_forwards"]) == (0, 0)
        assert (again["training_pairs"], again["dropped"]) == (first["training_pairs"], first["dropped"])
        assert {path: path.read_bytes() for path in cache.rglob("*.*") if path.parent.name != "tmp"} == before
    left_out = NUM_PAIRS - first["training_pairs"]
    message = fails(build(nan_model, pairs_file, cache))
    assert f"add --drop-nonfinite to leave out {left_out} as before" in message
    explained = run(dpo_cache("explain", cache, "--model", nan_model, "--dataset", pairs_file))
    assert explained["pairs_left_out"] == {"no-finite-logps": left_out}
    assert explained["sources"][0]["rows_unknown"] == []

    rows = message_pairs(NUM_PAIRS)
    more_rows = write_rows(tmp_path / "more.jsonl", [*message_pairs(6, seed=4), *rows])
    extended = run(build(nan_model, more_rows, cache, "--drop-nonfinite", "--extend"))
    recorded = run(dpo_cache("info", cache))["mixtures"]["train"]
    total = recorded["dropped"]["no-finite-logps"]
    assert total == first["dropped"]["no-finite-logps"] + extended["dropped"]["no-finite-logps"]
    assert total >= 2 * first["dropped"]["no-finite-logps"]


def test_a_model_that_is_too_sure_is_refused_in_words_of_its_own(
    reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """With logits blown up, ``Z`` follows whatever is not ``Z``, and the end follows ``Z``: both for certain."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference)
    model = AutoModelForCausalLM.from_pretrained(reference)
    (sure,) = tokenizer("Z", add_special_tokens=False).input_ids
    with torch.no_grad():
        for parameter in (*model.model.layers.parameters(), model.model.embed_tokens.weight, model.lm_head.weight):
            parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[sure] = torch.eye(2, model.config.hidden_size)[1]
        model.lm_head.weight[sure, 0] = 100.0
        model.lm_head.weight[tokenizer.eos_token_id, 1] = 100.0
    model.save_pretrained(tmp_path / "sure")
    tokenizer.save_pretrained(tmp_path / "sure")
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": f"say {number}"}],
            "chosen": [{"role": "assistant", "content": "Z"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for number in range(3)
    ]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    command = build(tmp_path / "sure", dataset, tmp_path / "cache")
    message = fails(command)
    assert "3 pairs have a log-probability of exactly 0.0, that is probability 1 for every scored token" in message
    assert "(chosen 0, rejected -" in message or "(chosen -0, rejected -" in message


def test_a_damaged_file_is_told_once_without_what_its_library_logs(reference: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "rows.jsonl"
    damaged.write_text('{"chosen": [{"role": "user"\n', encoding="utf-8")
    done = ended(build(reference, damaged, tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.count("is not JSON") == 1, done.stderr


def test_a_mistyped_dataset_leaves_no_cache_behind(reference: Path, tmp_path: Path) -> None:
    said = refusal("build", "--model", reference, "--dataset", tmp_path / "pairz.jsonl", "--cache", tmp_path / "cache")
    assert "pairz.jsonl: no such file" in said
    assert not (tmp_path / "cache").exists()

"""Caches for other trainers, and values from them: TRL run for real, open-instruct's files made."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_factory import make_cache, make_rows, mixture_rows
from commands import dpo_train, fails, logps_by_key, run
from commands_in_process import invoke, refusal, report
from datasets import Dataset
from documentation_blocks import ROOT, blocks_of
from dpo_cache import ReferenceCache
from tiny_model import message_pairs, plain_logps, rendered_pair, write_rows, write_tiny_model

from .conftest import NUM_PAIRS

TRL_SIDE = ROOT / "tests" / "trl_training.py"
TRL_BLOCKS = [block.text for block in blocks_of(ROOT / "docs" / "interoperability.md") if block.mark == "trl"]


def in_trl(code: str, folder: Path) -> dict[str, Any]:
    """Run a page's code in the environment of TRL."""
    interpreter = os.environ.get("DPO_CACHE_TRL_PYTHON")
    if not interpreter:
        pytest.skip("DPO_CACHE_TRL_PYTHON does not name an interpreter with TRL")
    done = subprocess.run(
        [interpreter, TRL_SIDE],
        cwd=folder,
        input=code,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf-home")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture
def folder(tmp_path: Path, reference: Path, pairs_file: Path, shared_cache: Path) -> Path:
    """What the pages of the documentation begin with: my-model, pairs.jsonl and my-cache."""
    shutil.copytree(reference, tmp_path / "my-model")
    shutil.copy(pairs_file, tmp_path / "pairs.jsonl")
    shutil.copytree(shared_cache, tmp_path / "my-cache")
    return tmp_path


def import_options(folder: Path, *, cache: str = "imported") -> tuple[str | Path, ...]:
    return ("--model", folder / "my-model", "--dataset", folder / "pairs.jsonl", "--cache", folder / cache)


def write_open_instruct(path: Path, folder: Path, rows: list[dict[str, Any]], *, averages: bool = False) -> Path:
    """What open-instruct leaves of these rows: two lists of float32, an entry a row."""
    sides: list[list[float]] = []
    for row in rows:
        prompt, *answers = rendered_pair(folder / "my-model", row)
        sums = [plain_logps(folder / "my-model", prompt, answer) for answer in answers]
        sides.append([value / len(ids) if averages else value for value, ids in zip(sums, answers, strict=True)])
    chosen, rejected = torch.tensor(sides, dtype=torch.float32).T
    torch.save({"chosen_logps": chosen.clone(), "rejected_logps": rejected.clone()}, path)
    return path


# ---- export ----------------------------------------------------------------------------------------------------------


def test_trl_trains_on_an_exported_cache_from_ln_2_and_loads_no_reference(folder: Path) -> None:
    assert invoke("export", folder / "my-cache", folder / "pairs.parquet").exit_code == 0
    answer = in_trl(TRL_BLOCKS[0], folder)
    assert answer["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert answer["losses"][1] < answer["losses"][0]
    # One model is loaded, the policy; each update has its forward pass and no other.
    assert (answer["loaded"], answer["forwards"], answer["has_reference"]) == (1, len(answer["losses"]), False)


def test_an_export_holds_the_mixture_in_its_order_in_row_groups(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.stages.export.ROWS_PER_GROUP", 16)
    written = report("export", folder / "my-cache", folder / "pairs.parquet")
    file = pq.ParquetFile(folder / "pairs.parquet")
    assert (written["pairs"], file.num_row_groups) == (NUM_PAIRS, 3)
    expected = [
        {
            "prompt_ids": row.pair.prompt_ids.tolist(),
            "chosen_ids": row.pair.chosen_ids.tolist(),
            "rejected_ids": row.pair.rejected_ids.tolist(),
            "ref_chosen_logps": row.ref_chosen_logps,
            "ref_rejected_logps": row.ref_rejected_logps,
        }
        for row in ReferenceCache.open(folder / "my-cache").pairs()
    ]
    assert file.read().to_pylist() == expected
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in expected)
    assert written["longest"] == longest
    assert "pairs.parquet exists" in refusal("export", folder / "my-cache", folder / "pairs.parquet")


def test_pairs_that_score_earlier_turns_are_not_exported(folder: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    rows = [{side: [*turns, *row[side]] for side in ("chosen", "rejected")} for row in message_pairs(2)]
    torch.save({name: torch.full((2,), -9.0) for name in ("chosen_logps", "rejected_logps")}, folder / "made-up.pt")
    dataset = write_rows(folder / "turns.jsonl", rows)
    options = ("--model", folder / "my-model", "--dataset", dataset, "--cache", folder / "masked")
    report("import", folder / "made-up.pt", *options, "--mask", "all-turns", "--rescore", 0)
    message = refusal("export", folder / "masked", folder / "turns.parquet")
    assert "mask all-turns" in message
    assert "--mask last-turn" in message
    assert not [path for path in folder.iterdir() if path.suffix in (".parquet", ".partial")]


def test_an_export_of_a_pair_with_one_thought_says_what_it_is(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    row = make_rows(1)[0]  # with a mask
    cache.shards.write([row])
    cache.write_mixture(
        "train",
        mixture_rows([row]),
        key_index=cache.shards.key_index(),
        tokenization={"settings": {"mask": "last-turn"}},
        sources=[{"path": "made up"}],
        dropped={},
    )
    message = refusal("export", cache.path, tmp_path / "pairs.parquet")
    assert f"the pair {row.key.hex()} does not score all tokens of its responses and no others" in message
    assert "goes on from a thought that the chat template opens" in message
    assert "--mask last-turn" not in message


# ---- import ----------------------------------------------------------------------------------------------------------


def assert_imported(folder: Path, *, cache: str = "imported") -> None:
    """The imported cache is sound and says what the built one says, within the rounding of float32."""
    assert report("verify", folder / cache)["sound"]
    built, imported = logps_by_key(folder / "my-cache"), logps_by_key(folder / cache)
    assert imported.keys() == built.keys()
    for key, values in imported.items():
        assert values == pytest.approx(built[key], rel=2e-6)


def test_what_trl_computed_is_imported_and_trains_from_ln_2(folder: Path) -> None:
    assert in_trl(TRL_BLOCKS[1], folder)["losses"] == []
    imported = report("import", folder / "trl-pairs", *import_options(folder))
    assert (imported["pairs_imported"], imported["source"]["from"]) == (NUM_PAIRS, "trl")
    assert imported["rescored"]["max_per_token"] < 1e-5
    assert_imported(folder)
    run(dpo_train("--cache", folder / "imported", "--output", folder / "run", "--loss", "dpo", "--max-steps", 1))
    step_zero = json.loads((folder / "run" / "step0.json").read_text(encoding="utf-8"))
    assert step_zero["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_an_export_comes_back_whatever_the_order_and_beside_rows_of_others(folder: Path) -> None:
    report("export", folder / "my-cache", folder / "all.parquet")
    table = pq.read_table(folder / "all.parquet")
    stranger = table.slice(0, 1).set_column(0, "prompt_ids", pa.array([[1, 2, 3]], table.schema.field(0).type))
    shuffled = pa.concat_tables([stranger, table]).take(np.random.RandomState(0).permutation(NUM_PAIRS + 1))
    pq.write_table(shuffled, folder / "shuffled.parquet")
    assert report("import", folder / "shuffled.parquet", *import_options(folder))["pairs_imported"] == NUM_PAIRS
    assert_imported(folder)
    (first, *_) = ReferenceCache.open(folder / "imported").shards.paths()
    recorded = json.loads(pq.read_metadata(first).metadata[b"dpo_cache.recorded"])["imported"]
    assert (recorded["from"], recorded["name"], recorded["values"]) == ("trl", "shuffled.parquet", "sums")
    assert "begun with values imported from shuffled.parquet (trl)" in invoke("info", folder / "imported").stdout
    # Once more: nothing is left to import, and no model is loaded.
    again = report("import", folder / "shuffled.parquet", *import_options(folder))
    assert (again["pairs_imported"], again["pairs_reused"], again["rescored"]) == (0, NUM_PAIRS, None)


def test_an_export_names_its_reference_and_another_is_refused(folder: Path) -> None:
    report("export", folder / "my-cache", folder / "pairs.parquet")
    other = write_tiny_model(folder / "other", seed=7)
    message = refusal("import", folder / "pairs.parquet", *import_options(folder), "--model", other)
    assert "says that its values are of the reference" in message


def test_an_import_from_a_mistyped_dataset_leaves_no_cache_behind(folder: Path) -> None:
    report("export", folder / "my-cache", folder / "pairs.parquet")
    options = ("--model", folder / "my-model", "--dataset", folder / "mistyped.jsonl", "--cache", folder / "imported")
    assert "mistyped.jsonl" in refusal("import", folder / "pairs.parquet", *options)
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("averages", [False, True])
def test_open_instructs_file_is_imported_by_position_and_the_sample_tells_sums_from_averages(
    folder: Path, averages: bool
) -> None:
    source = write_open_instruct(folder / "5b1f.pt", folder, message_pairs(NUM_PAIRS), averages=averages)
    right, wrong = ("averages", "sums") if averages else ("sums", "averages")
    message = refusal("import", source, *import_options(folder), "--values", wrong)
    assert f"holds {right}, not {wrong}" in message
    assert report("import", source, *import_options(folder), "--values", right)["source"]["from"] == "open-instruct"
    assert_imported(folder)


def test_positions_count_all_rows_or_those_that_make_a_pair_and_repeats_as_often(folder: Path) -> None:
    rows = message_pairs(NUM_PAIRS)
    unusable = {**rows[3], "rejected": rows[3]["chosen"]}
    write_rows(folder / "one.jsonl", [*rows[:3], unusable, *rows[4:20]])
    write_rows(folder / "two.jsonl", rows[20:])
    datasets = ("--dataset", f"{folder}/one.jsonl,amount=2.0", "--dataset", folder / "two.jsonl")
    options = ("--model", folder / "my-model", *datasets, "--cache")
    kept = [*rows[:3], *rows[4:20]] * 2 + rows[20:]
    counted = [*rows[:20], *rows[:20], *rows[20:]]  # the unusable row has a value too
    for name, of_rows in (("kept", kept), ("counted", counted)):
        source = write_open_instruct(folder / f"{name}.pt", folder, of_rows)
        imported = report("import", source, *options, folder / name, "--rescore", NUM_PAIRS)
        assert (imported["pairs_imported"], imported["training_pairs"]) == (NUM_PAIRS - 1, len(kept))
    source = write_open_instruct(folder / "short.pt", folder, kept[1:])
    message = refusal("import", source, *options, folder / "short")
    assert f"has values for {len(kept) - 1} rows, by their position, and the datasets have {len(counted)}" in message


def test_a_source_with_values_alone_is_taken_by_position(folder: Path) -> None:
    cache = ReferenceCache.open(folder / "my-cache")
    rows = []
    for row in message_pairs(NUM_PAIRS):
        found = cache.find_tokens(*rendered_pair(folder / "my-model", row))
        assert found is not None
        rows.append({"ref_chosen_logps": found.ref_chosen_logps, "ref_rejected_logps": found.ref_rejected_logps})
    Dataset.from_list(rows).save_to_disk(str(folder / "trl-columns"))
    (arrow,) = (folder / "trl-columns").glob("*.arrow")
    assert report("import", arrow, *import_options(folder))["pairs_imported"] == NUM_PAIRS
    assert_imported(folder)


def exported(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "pairs.parquet").exists():
        report("export", folder / "my-cache", folder / "pairs.parquet")
    rows: list[dict[str, Any]] = pq.read_table(folder / "pairs.parquet").to_pylist()
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).to_parquet(path)
    return path


def test_rows_in_another_order_cut_sequences_and_missing_values_are_refused(folder: Path) -> None:
    rows = message_pairs(NUM_PAIRS)
    shifted = write_open_instruct(folder / "shifted.pt", folder, [*rows[1:], rows[0]])
    message = refusal("import", shifted, *import_options(folder))
    assert "is not what the reference gives: on a sample of 16 pairs they differ by" in message
    assert "at most 0.0001 in float32" in message
    pairs = exported(folder)
    # Only the longest is wrong, as a limit on the length would make it: a sample of one finds it.
    longest = max(pairs, key=lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
    cut = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] * (0.9 if row is longest else 1)} for row in pairs]
    source = written(folder / "cut.parquet", cut)
    assert "is not what the reference gives" in refusal("import", source, *import_options(folder), "--rescore", 1)
    source = written(folder / "missing.parquet", [{**pairs[0], "ref_rejected_logps": 0.0}, *pairs[1:]])
    message = refusal("import", source, *import_options(folder))
    assert "values that are not finite or not below zero for 1 pairs" in message
    assert not list((folder / "imported" / "shards").iterdir())


def test_what_a_source_lacks_is_left_to_a_build_and_the_rest_stays(folder: Path) -> None:
    part = written(folder / "part.parquet", exported(folder)[:30])
    message = refusal("import", part, *import_options(folder))
    assert f"has values for 30 of {NUM_PAIRS} pairs, which are imported, and none for 10" in message
    built = report("build", *import_options(folder), "--dry-run")
    assert (built["pairs_reused"], built["pairs_scored"]) == (30, 10)
    others = write_rows(folder / "others.jsonl", message_pairs(5, seed=9))
    options = ("--model", folder / "my-model", "--dataset", others, "--cache", folder / "others")
    assert "none of the 5 pairs" in refusal("import", part, *options)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"chosen_logps": torch.zeros(2)}, "holds ['chosen_logps']"),
        ({"chosen_logps": torch.zeros(2), "rejected_logps": torch.zeros(3)}, "holds 2 chosen and 3 rejected values"),
        ({"chosen_logps": torch.zeros(2, 2), "rejected_logps": torch.zeros(2)}, "something else than lists of numbers"),
        (Path("/etc"), "cannot be read"),  # an object of Python, which is not unpickled
    ],
)
def test_a_file_that_holds_something_else_is_refused(folder: Path, content: Any, found: str) -> None:
    torch.save(content, folder / "other.pt")
    assert found in refusal("import", folder / "other.pt", *import_options(folder))


@pytest.mark.parametrize("tokens", [[1, None], [2**40]])
def test_columns_that_hold_no_token_ids_are_refused(folder: Path, tokens: list[Any]) -> None:
    columns = {"prompt_ids": [tokens], "chosen_ids": [[3]], "rejected_ids": [[4]]}
    table = pa.table({**columns, "ref_chosen_logps": [-1.0], "ref_rejected_logps": [-1.0]})
    pq.write_table(table, folder / "odd.parquet")
    assert "odd.parquet cannot be read: " in refusal("import", folder / "odd.parquet", *import_options(folder))


def test_ld_dpo_is_refused_by_name_on_imported_pairs(folder: Path) -> None:
    source = write_open_instruct(folder / "5b1f.pt", folder, message_pairs(NUM_PAIRS))
    report("import", source, *import_options(folder))
    for row in ReferenceCache.open(folder / "imported").pairs():
        is_known = [not math.isnan(value) for value in (row.ref_chosen_common_logps, row.ref_rejected_common_logps)]
        assert is_known == [row.chosen_tokens <= row.rejected_tokens, row.rejected_tokens <= row.chosen_tokens]
    objective = ("--loss", "dpo", "--ld-alpha", 0.5)
    message = fails(dpo_train("--cache", folder / "imported", "--output", folder / "run", *objective))
    assert "--ld-alpha needs the reference's sums up to the length of each pair's shorter response" in message


# ---- the Python API --------------------------------------------------------------------------------------------------


def test_the_example_of_a_trainer_starts_at_ln_2_and_learns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, *_ = (block.text for block in blocks_of(ROOT / "docs" / "python-api.md") if block.language == "python")
    assert len([line for line in example.splitlines() if line and not line.startswith(("import", "from"))]) <= 15
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "python-api.md", "exec"), {})
    losses = [float(line.split()[1]) for line in printed.getvalue().splitlines()]
    assert len(losses) == NUM_PAIRS
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert np.mean(losses[-10:]) < losses[0] - 0.01

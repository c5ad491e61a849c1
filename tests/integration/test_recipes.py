"""Every recipe runs as its script says, and means the numbers that were published."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from byte_tokenizer_factory import CHATML, write_byte_tokenizer
from cache_factory import make_cache, make_rows, mixture_rows
from click.testing import CliRunner, Result
from commands import metrics
from distributed_run import free_port
from dpo_cache.cli import build_command, dpo_train
from dpo_cache.pipeline.data.dataset_spec import DatasetSpec
from tiny_model import message_pairs, write_rows, write_tiny_model
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "train"
SCRIPTS = sorted([*TRAIN.rglob("*.sh"), *TRAIN.rglob("*.sbatch")])


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is known of how a model was trained, as its sources give it.

    Attributes:
        name: The script, without its suffix.
        reference: The model it starts from.
        gpus: On how many.
        pairs_per_gpu: In one micro-step.
        accumulation: Micro-steps in one update.
        learning_rate: Its peak.
        length: Longest sequence in tokens.
        template: The pinned template; None for the tokenizer's own.
        era: Which of open-instruct's masks.
        pairs: In the mixture; 100,000 where no source counts them.
        steps: Updates: pairs / 128, rounded up.
        warmup: Updates: steps / 10, rounded down.
        after_warmup: Updates over which the rate falls to 0: steps − warmup.
    """

    name: str
    reference: str
    gpus: int
    pairs_per_gpu: int
    accumulation: int
    learning_rate: float
    length: int
    template: str | None
    era: str
    pairs: int
    steps: int
    warmup: int
    after_warmup: int


# The numbers of the last three columns are worked out by hand.
TABLE = """
name                    reference                          gpus  micro  accum  rate    length  template      era         pairs   steps  warmup  after
tulu3/dpo_8b            allenai/Llama-3.1-Tulu-3-8B-SFT       8      1     16  5e-7      2048  tulu          all-turns   271409  2121     212   1909
tulu3/dpo_70b           allenai/Llama-3.1-Tulu-3-70B-SFT     64      1      2  2e-7      2048  tulu          all-turns   334367  2613     261   2352
olmo2/dpo_1b            allenai/OLMo-2-0425-1B-SFT            8      8      2  2.5e-6    2048  tulu-bos      all-turns   100000   782      78    704
olmo2/dpo_7b            allenai/OLMo-2-1124-7B-SFT           32      1      4  1e-6      2048  tulu-bos      all-turns   100000   782      78    704
olmo2/dpo_13b           allenai/OLMo-2-1124-13B-SFT          32      1      4  8e-7      2048  tulu-bos      all-turns   100000   782      78    704
olmo2/dpo_32b           allenai/OLMo-2-0325-32B-SFT          32      1      4  2e-6      2048  tulu-bos      all-turns   100000   782      78    704
olmo3/dpo_7b_instruct   allenai/Olmo-3-7B-Instruct-SFT       32      1      4  1e-6     16384  -             last-turn   260000  2032     203   1829
olmo3/dpo_32b_instruct  allenai/Olmo-3.1-32B-Instruct-SFT    64      1      2  1e-6      8192  -             last-turn   260000  2032     203   1829
olmo3/dpo_7b_think      allenai/Olmo-3-7B-Think-SFT          32      1      4  8e-8     16384  olmo-thinker  last-turn   150000  1172     117   1055
olmo3/dpo_32b_think     allenai/Olmo-3-32B-Think-SFT        128      1      1  7e-8      8192  -             last-turn   200000  1563     156   1407
"""  # noqa: E501


def published_in(line: str) -> Published:
    name, reference, gpus, micro, accumulation, rate, length, template, era, pairs, steps, warmup, after = line.split()
    return Published(
        name=name,
        reference=reference,
        gpus=int(gpus),
        pairs_per_gpu=int(micro),
        accumulation=int(accumulation),
        learning_rate=float(rate),
        length=int(length),
        template=None if template == "-" else template,
        era=f"open-instruct-{era}",
        pairs=int(pairs),
        steps=int(steps),
        warmup=int(warmup),
        after_warmup=int(after),
    )


UNCOUNTED = 100_000
PUBLISHED = [published_in(line) for line in TABLE.splitlines()[2:]]
every_recipe = pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)


# ---- scripts ----


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_recipe_is_tested_here() -> None:
    scripts = {str(script.relative_to(TRAIN)).removesuffix(".sh") for script in TRAIN.glob("*/*.sh")}
    assert scripts == {published.name for published in PUBLISHED} | {"debug/dpo"}


LAUNCHERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "local": ({}, []),
    "srun": (
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "12"},
        ["srun --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=12 --kill-on-bad-exit=1"],
    ),
    "torchrun": (
        {"HEAD": "node0", "NODES": "2", "GPUS": "8"},
        [
            "torchrun --no-python --nnodes=2 --nproc-per-node=8 --shutdown-timeout=600 "
            "--rdzv-backend=c10d --rdzv-endpoint=node0:29500 "
            "--rdzv-id=dpo-29500",
            "torchrun --no-python --nnodes=2 --nproc-per-node=8 --shutdown-timeout=600 "
            "--rdzv-backend=c10d --rdzv-endpoint=node0:29501 "
            "--rdzv-id=dpo-29501",
        ],
    ),
    "deepspeed": (
        {"HOSTFILE": "hosts", "PORT": "4000"},
        [
            "deepspeed --hostfile=hosts --master_port=4000 --no_python --no_local_rank",
            "deepspeed --hostfile=hosts --master_port=4001 --no_python --no_local_rank",
        ],
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_recipe_starts_both_commands_with_the_launcher_that_is_there(launcher: str, tmp_path: Path) -> None:
    variables, expected = LAUNCHERS[launcher]
    started = started_by("tulu3/dpo_8b", tmp_path, variables, "--beta", "2")
    prefixes = (expected * 2)[:2] if expected else ["", ""]
    files = f"{TRAIN}/tulu3/dpo_8b"
    assert started == [
        f"{prefixes[0]} dpo-cache build --config {files}.build.yaml --cache caches/tulu3-8b".strip(),
        f"{prefixes[1]} dpo-train --config {files}.train.yaml --cache caches/tulu3-8b --output runs/tulu3-8b "
        "--resume --beta 2".strip(),
    ]


def test_without_gpus_and_without_a_list_of_machines_a_launcher_starts_one_process(tmp_path: Path) -> None:
    for launcher, option in (("torchrun", "--nproc-per-node=1 "), ("deepspeed", "--num_gpus=1 ")):
        assert option in started_by("debug/dpo", tmp_path, {"LAUNCHER": launcher, "MODEL": "m", "DATASET": "d"})[0]


@every_recipe
def test_a_script_starts_its_own_files(published: Published, tmp_path: Path) -> None:
    build, train = started_by(published.name, tmp_path, {"CACHE": "C", "OUTPUT": "O"})
    files = TRAIN / published.name
    assert build == f"dpo-cache build --config {files}.build.yaml --cache C"
    assert train == f"dpo-train --config {files}.train.yaml --cache C --output O --resume"


def test_the_number_of_machines_is_the_originals(tmp_path: Path) -> None:
    nodes = {}
    for published in PUBLISHED:
        build, _ = started_by(published.name, tmp_path, {"LAUNCHER": "torchrun", "GPUS": "8"})
        nodes[published.name] = int(build.split("--nnodes=")[1].split()[0])
    # the published Tülu-3 8B run took one machine; its script, and with it this recipe, starts four
    assert nodes == {published.name: published.gpus // 8 for published in PUBLISHED} | {"tulu3/dpo_8b": 4}


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"RANK": "0"}, ["dpo-train"], "start it once: it calls the launcher itself"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ["dpo-train"], "start it once: it calls the launcher itself"),
        ({"LAUNCHER": "mpirun"}, ["dpo-train"], "it can be local, srun, torchrun or deepspeed"),
        ({}, [], "which command?"),
        ({}, ["dpo-traine"], "dpo-traine is not installed here"),
    ],
)
def test_the_launch_script_says_what_is_wrong(
    variables: dict[str, str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = bash([TRAIN / "launch.sh", *arguments], tmp_path, variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr


def test_a_shell_inside_a_step_of_slurm_starts_no_step_of_its_own(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert bash([TRAIN / "launch.sh", "dpo-train"], tmp_path, variables).stdout == "dpo-train\n"


# ---- YAML ----


@every_recipe
def test_a_build_resolves_to_the_published_tokens(published: Published, tmp_path: Path) -> None:
    config = recipe_yaml(published.name, "build")
    assert config["model"] == published.reference
    stand_in = write_rows(tmp_path / "pairs.jsonl", message_pairs(8))
    specs = [DatasetSpec.parse(spec) for spec in config["dataset"]]
    datasets = [f"--dataset={stand_in}" + (f",amount={spec.amount}" if spec.amount else "") for spec in specs]
    model = stand_in_model(tmp_path / "model")
    done = CliRunner().invoke(
        build_command,
        [
            *(f"--config={TRAIN / published.name}.build.yaml", f"--model={model}", f"--tokenizer={model}"),
            *(*datasets, f"--cache={tmp_path / 'cache'}", "--dry-run", "--json"),
        ],
    )
    report = result_of(done)
    counts = [spec.num_picked(8) for spec in specs]
    assert report["training_pairs"] == sum(counts)
    if published.name.endswith("instruct"):  # their mixers count
        assert sum(counts) == published.pairs
    else:  # one whole dataset
        assert counts == [8]
    resolved = {name: config.get(name) for name in ("max_seq_length", "truncation", "chat_template", "mask")}
    assert resolved == {
        "max_seq_length": published.length,
        "truncation": "truncate-response-right",
        "chat_template": published.template,
        "mask": published.era,
    }


@every_recipe
def test_a_run_resolves_to_the_published_numbers(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(published.name, published.pairs, published.gpus, tmp_path, monkeypatch)
    assert plan["global_batch_size"] == published.gpus * published.pairs_per_gpu * published.accumulation == 128
    assert (plan["num_pairs"], plan["num_ranks"]) == (published.pairs, published.gpus)
    assert (plan["total_steps"], plan["steps_per_epoch"]) == (published.steps, published.steps)
    assert (plan["warmup_steps"], plan["schedule"]) == (published.warmup, "linear")
    # The first update of a linear warm-up has rate 0; the last one is one share of the fall away from 0.
    rates = {int(step): rate for step, rate in plan["learning_rate_at_update"].items()}
    peak = published.learning_rate
    assert rates == pytest.approx(
        {
            1: 0.0,
            2: peak / published.warmup,
            published.warmup + 1: peak,
            published.steps: peak / published.after_warmup,
        },
        rel=1e-9,
    )
    config = recipe_yaml(published.name, "train")
    assert [config[name] for name in ("loss", "beta", "weight_decay", "max_grad_norm")] == ["dpo_norm", 5, 0, 1]
    assert config["gradient_checkpointing"] is True
    assert config["zero_stage"] == (2 if published.name == "olmo2/dpo_1b" else 3)
    assert config.get("offload_parameters", False) == (published.name == "tulu3/dpo_70b")


def test_the_global_batch_is_the_published_one_on_any_number_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [planned("tulu3/dpo_8b", 1000, gpus, tmp_path / str(gpus), monkeypatch) for gpus in (1, 32)]
    assert [(plan["global_batch_size"], plan["total_steps"]) for plan in plans] == [(128, 8), (128, 8)]


def test_every_file_of_a_recipe_names_its_source() -> None:
    for published in PUBLISHED:
        for stage in ("build", "train"):
            assert "\n# Source: " in (TRAIN / f"{published.name}.{stage}.yaml").read_text("utf-8")


@every_recipe
def test_the_table_in_the_docs_has_the_numbers_of_the_files(published: Published) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `{published.name}` \|.*$", page, flags=re.MULTILINE)
    build, train = (recipe_yaml(published.name, stage) for stage in ("build", "train"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    pairs = "–" if published.pairs == UNCOUNTED else f"{published.pairs:,}"
    assert cells[1:9] == [
        str(published.gpus // 8),
        pairs,
        str(train["global_batch_size"]),
        re.sub(r"e-0?", "e-", f"{train['learning_rate']:g}"),
        str(build["max_seq_length"]),
        build["mask"].removeprefix("open-instruct-"),
        f"`{build['chat_template']}`" if "chat_template" in build else "tokenizer's",
        str(train["seed"]),
    ]


# ---- for real ----


STUB_SRUN = """#!/usr/bin/env bash
# What srun does on one node: the command once for each task, with the variables of a step.
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* ]] || ntasks=${1#*=}
    shift
done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$ntasks SLURM_STEP_TASKS_PER_NODE=$ntasks SLURM_NODEID=0
pids=()
for ((task = 0; task < ntasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_the_debug_recipe_trains_as_a_job_of_slurm(
    reference: Path, pairs_file: Path, programs: Path, tmp_path: Path
) -> None:
    write_script(tmp_path / "srun", STUB_SRUN)
    job = {
        "PATH": f"{tmp_path}:{programs}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"},
        **{"SLURM_SUBMIT_DIR": str(ROOT), "MASTER_PORT": str(free_port())},
        **{"MODEL": str(reference), "DATASET": f"{pairs_file},amount=8"},
        **{"CACHE": str(tmp_path / "cache"), "OUTPUT": str(tmp_path / "run")},
        **{"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    }
    done = subprocess.run(
        ["bash", str(TRAIN / "slurm.sbatch"), "scripts/train/debug/dpo.sh", "--num-train-epochs", "1"],
        env={**os.environ, **job},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = metrics(tmp_path / "run")
    assert [line["training_step"] for line in lines] == [1, 2]
    assert lines[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_job_whose_time_is_up_stops_its_step_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    process = batch_job(tmp_path, scancel='echo "scancel $*" >>told; kill -TERM "$(cat pid)"')
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 1
    assert (tmp_path / "told").read_text().splitlines() == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_stays_out_of_the_queue(code: int, tmp_path: Path) -> None:
    process = batch_job(tmp_path, scancel="echo scancel >>told", exit_code=code)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert process.wait(timeout=20) == code
    assert not (tmp_path / "told").exists()


# ---- helpers ----


def recipe_yaml(name: str, stage: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((TRAIN / f"{name}.{stage}.yaml").read_text("utf-8"))
    return values


def stand_in_model(folder: Path) -> Path:
    """A tiny model whose tokenizer has a bos, an eos and a template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(write_byte_tokenizer(folder, chat_template=CHATML, pad_token="</s>"))
    return write_tiny_model(folder, tokenizer=tokenizer)


def result_of(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, (done.stderr, done.exception)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def planned(name: str, pairs: int, gpus: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``dpo-train --plan`` makes of a recipe, on a mixture of one pair as many times as it had pairs."""
    cache = make_cache(folder / "cache")
    rows = make_rows(1)
    cache.shards.write(rows)
    one = mixture_rows(rows)
    repeated = type(one)(**{field: np.repeat(getattr(one, field), pairs) for field in one.__slots__})
    cache.write_mixture(
        "train",
        repeated,
        key_index=cache.shards.key_index(),
        tokenization={},
        sources=[{"path": "made up"}],
        dropped={},
    )
    for variable, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": min(8, gpus)}.items():
        monkeypatch.setenv(variable, str(value))
    files = [f"--config={TRAIN / name}.train.yaml", f"--cache={cache.path}", f"--output={folder / 'run'}"]
    return result_of(CliRunner().invoke(dpo_train, [*files, "--plan", "--json"]))


def write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def bash(command: Sequence[str | Path], folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script where all commands only say what they were started with."""
    for name in ("dpo-cache", "dpo-train", "srun", "torchrun", "deepspeed"):
        write_script(folder / name, f'#!/usr/bin/env bash\necho {name} "$@"\n')
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), **variables}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def started_by(name: str, folder: Path, variables: Mapping[str, str], *arguments: str) -> list[str]:
    """The two command lines that a recipe's script comes to."""
    done = bash([TRAIN / f"{name}.sh", *arguments], folder, variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(f"{folder}/", "").splitlines()


def batch_job(folder: Path, *, scancel: str, exit_code: int = 1) -> subprocess.Popen[bytes]:
    """The batch script around a recipe that runs until it is told to stop, once that runs."""
    write_script(folder / "scancel", f"#!/usr/bin/env bash\n{scancel}\n")
    write_script(folder / "scontrol", '#!/usr/bin/env bash\necho "scontrol $*" >>told\n')
    write_script(
        folder / "recipe.sh",
        f"#!/usr/bin/env bash\ntrap 'exit {exit_code}' TERM\necho $$ >pid.new\nmv pid.new pid\n"
        "while :; do sleep 0.05; done\n",
    )
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", str(TRAIN / "slurm.sbatch"), "recipe.sh"], env=environment)
    deadline = time.monotonic() + 20
    while not (folder / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process

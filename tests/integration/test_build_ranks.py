"""Builds of several processes: a launcher's agents, a worker that dies, weights partitioned over ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from commands import assert_same_logps, dpo_cache, logps_by_key, run
from distributed_run import free_port
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from peft import LoraConfig, get_peft_model
from tiny_model import message_pairs, write_rows, write_tiny_model
from transformers import AutoModelForCausalLM

from .conftest import NUM_PAIRS


def scoring_processes(cache: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "score" in (process.info["cmdline"] or ()) and any(str(cache) in word for word in process.info["cmdline"])
    ]


def test_a_worker_killed_in_the_middle_costs_its_unit_in_hand_which_another_takes(
    reference: Path, tmp_path: Path
) -> None:
    dataset = write_rows(tmp_path / "pairs.jsonl", message_pairs(1600))
    cache = tmp_path / "cache"
    command = dpo_cache(
        *("build", "--model", reference, "--dataset", dataset, "--cache", cache, "--num-workers", 2),
        *("--tokens-per-batch", 64),
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as build:
        while build.poll() is None and not list(cache.glob("shards/*.parquet")):
            time.sleep(0.01)
        scoring_processes(cache)[0].send_signal(signal.SIGKILL)
        said = build.communicate(timeout=120)[1]
    assert build.returncode == 0, said
    assert "warning: a process of this job ended with SIGKILL" in said
    assert len(logps_by_key(cache)) == 1600


def test_two_agents_of_torchrun_build_one_cache(
    reference: Path, pairs_file: Path, shared_cache: Path, programs: Path, tmp_path: Path
) -> None:
    cache, port = tmp_path / "cache", free_port()
    build = [f"{programs}/dpo-cache", "build"]
    build += [f"--model={reference}", f"--dataset={pairs_file}", f"--cache={cache}"]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"),
                *("--nproc-per-node=1", "--rdzv-backend=static", f"--rdzv-endpoint=127.0.0.1:{port}"),
                *(f"--master-port={port}", "--no-python", *build),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=180)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert_same_logps(logps_by_key(cache), logps_by_key(shared_cache), relative=1e-5)


def test_a_reference_partitioned_over_two_ranks_gives_the_rows_of_a_whole_one(
    reference: Path, pairs_file: Path, shared_cache: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    report = run(
        dpo_cache(
            *("build", "--model", reference, "--dataset", pairs_file, "--cache", cache),
            *("--num-workers", 2, "--zero-stage", 3),
        ),
        environment={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (report["pairs_scored"], report["warnings"]) == (NUM_PAIRS, [])
    assert_same_logps(logps_by_key(cache), logps_by_key(shared_cache), relative=1e-5)


def test_a_partitioned_reference_is_scored_by_the_tasks_of_a_slurm_step(
    reference: Path, pairs_file: Path, shared_cache: Path, programs: Path, tmp_path: Path
) -> None:
    """srun says which rank a task is in variables of its own, which DeepSpeed does not read."""
    cache = tmp_path / "cache"
    build = [f"{programs}/dpo-cache", "build", "--zero-stage=3"]
    build += [f"--model={reference}", f"--dataset={pairs_file}", f"--cache={cache}"]
    step = {
        **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
        **{"SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    }
    tasks = [
        subprocess.Popen(
            build,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **step, "SLURM_PROCID": task, "SLURM_LOCALID": task},
        )
        for task in ("0", "1")
    ]
    said = [task.communicate(timeout=180)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], "\n".join(said)
    assert_same_logps(logps_by_key(cache), logps_by_key(shared_cache), relative=1e-5)


def test_a_larger_reference_with_an_adapter_in_bf16_gives_under_torchrun_and_zero3_the_rows_of_a_whole_one(
    pairs_file: Path, programs: Path, tmp_path: Path
) -> None:
    """Its matrices have more than the 100,000 numbers up to which DeepSpeed leaves a weight whole."""
    large = write_tiny_model(tmp_path / "large", hidden_size=128, intermediate_size=1024)
    write_adapter(large, tmp_path / "adapter")
    whole, partitioned = tmp_path / "whole", tmp_path / "partitioned"
    build = (
        "build",
        f"--model={large}",
        f"--adapter={tmp_path}/adapter",
        f"--dataset={pairs_file}",
        "--dtype=bfloat16",
    )
    run(dpo_cache(*build, "--cache", whole))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
    run(
        [*launcher, f"{programs}/dpo-cache", *build, "--zero-stage=3", f"--cache={partitioned}"],
        environment={"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert_same_logps(logps_by_key(partitioned), logps_by_key(whole), relative=2e-3)  # some of bf16's 8 bits
    assert ReferenceCache.open(partitioned).reference_id == ReferenceCache.open(whole).reference_id


def write_adapter(model: Path, folder: Path) -> Any:
    """A LoRA adapter that changes something; the adapted model."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.5),
    )
    adapted.save_pretrained(folder)
    return adapted


def test_base_adapter_and_merged_model_are_three_references_and_merging_changes_no_value(
    reference: Path, pairs_file: Path, shared_cache: Path, tmp_path: Path
) -> None:
    adapted = write_adapter(reference, tmp_path / "adapter")
    merged = tmp_path / "merged"
    shutil.copytree(reference, merged)
    adapted.merge_and_unload().save_pretrained(merged)
    options = ("--dataset", pairs_file)
    adapted_build = ("build", "--model", reference, *options, "--cache", tmp_path / "a")
    run(dpo_cache(*adapted_build, "--adapter", tmp_path / "adapter"))
    run(dpo_cache("build", "--model", merged, *options, "--cache", tmp_path / "m"))
    caches = [shared_cache, tmp_path / "a", tmp_path / "m"]
    assert len({ReferenceCache.open(cache).reference_id for cache in caches}) == 3
    base, with_adapter, after_merging = map(logps_by_key, caches)
    assert_same_logps(with_adapter, after_merging, relative=1e-5)
    assert all(abs(base[key][0] - with_adapter[key][0]) > 1e-3 for key in base)

    (tmp_path / "adapter").rename(tmp_path / "moved")
    report = run(dpo_cache(*adapted_build, "--adapter", tmp_path / "moved"))
    assert (report["pairs_reused"], report["reference_forwards"]) == (NUM_PAIRS, 0)

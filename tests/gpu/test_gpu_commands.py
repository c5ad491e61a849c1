"""Both commands on a GPU: the same numbers as on a CPU, the proof, resuming, and what makes memory go further."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commands import assert_same_logps, dpo_cache, dpo_train, kill_when, logps_by_key, metrics, run
from dpo_cache.pipeline.scoring.attention_choice import gpu_surely_runs_flex
from safetensors.torch import load_file

RECIPE = ("--global-batch-size", 8, "--learning-rate", 1e-3, "--tokens-per-microbatch", 256)
LEARNING = ("train_loss", "rewards/margin", "logps/chosen", "grad_norm")
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def fp32_caches(tmp_path_factory: pytest.TempPathFactory, reference: Path, pairs_file: Path) -> tuple[Path, Path]:
    """The same pairs scored in float32 with the same kernel on the GPU and on the CPU."""
    folder = tmp_path_factory.mktemp("caches")
    for name, environment in (("gpu", {}), ("cpu", ON_CPU)):
        options = ("--model", reference, "--dataset", pairs_file, "--cache", folder / name, "--dtype", "float32")
        run(dpo_cache("build", *options, "--attn-implementation", "sdpa"), environment=environment)
    return folder / "gpu", folder / "cpu"


def test_a_gpu_scores_as_a_cpu_does(fp32_caches: tuple[Path, Path]) -> None:
    gpu, cpu = (logps_by_key(cache) for cache in fp32_caches)
    assert_same_logps(gpu, cpu, relative=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_every_kernel_scores_alike(
    kernel: str, fp32_caches: tuple[Path, Path], reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    options = ("--model", reference, "--dataset", pairs_file, "--cache", tmp_path / "cache", "--dtype", "float32")
    run(dpo_cache("build", *options, "--attn-implementation", kernel))
    assert_same_logps(logps_by_key(tmp_path / "cache"), logps_by_key(fp32_caches[0]), relative=1e-4)


def test_flex_attention_is_the_default_and_its_values_are_verified(bf16_cache: Path) -> None:
    """On the GPUs that the README recommends; a GPU made for graphics keeps sdpa."""
    expected = "flex_attention" if gpu_surely_runs_flex(torch.device("cuda")) else "sdpa"
    assert json.loads((bf16_cache / "cache.json").read_text())["identity"]["attention"] == expected
    report = run(dpo_cache("verify", bf16_cache, "--rescore", 20))
    assert report["sound"]
    assert report["rescored"]["pairs"] == 20


def test_partitioned_scoring_gives_the_same(
    fp32_caches: tuple[Path, Path], reference: Path, pairs_file: Path, tmp_path: Path
) -> None:
    options = ("--model", reference, "--dataset", pairs_file, "--cache", tmp_path / "cache", "--dtype", "float32")
    run(dpo_cache("build", *options, "--zero-stage", 3))
    assert_same_logps(logps_by_key(tmp_path / "cache"), logps_by_key(fp32_caches[0]), relative=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_updates_on_a_gpu_equal_those_on_a_cpu(zero_stage: int, fp32_caches: tuple[Path, Path], tmp_path: Path) -> None:
    options = (*RECIPE, "--max-steps", 3, "--zero-stage", zero_stage, "--warmup-ratio", 0)
    lines = []
    for name, environment in (("gpu", {}), ("cpu", ON_CPU)):
        command = dpo_train("--cache", fp32_caches[0], "--output", tmp_path / name, *options, "--num-gpus", 1)
        run(command, environment=environment)
        lines.append(metrics(tmp_path / name))
    for ours, theirs in zip(*lines, strict=True):
        for field in LEARNING:
            assert ours[field] == pytest.approx(theirs[field], rel=1e-3, abs=1e-4), (ours["training_step"], field)
    assert "perf/peak_memory_gib" in lines[0][-1]


WAYS = {
    "plain": (),
    "recomputing": ("--gradient-checkpointing",),
    "optimizer on the host": ("--offload-optimizer",),
    "weights on the host": ("--offload-optimizer", "--offload-parameters"),
    "liger": ("--use-liger-kernel",),
    "lora": ("--use-lora", "--lora-rank", 4),
    "stage 0": ("--zero-stage", 0),
    "stage 2": ("--zero-stage", 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_in_bfloat16_starts_at_its_reference_and_learns(way: str, bf16_cache: Path, tmp_path: Path) -> None:
    options = (*RECIPE, "--max-steps", 6, "--warmup-ratio", 0, "--num-gpus", 1, *WAYS[way])
    report = run(dpo_train("--cache", bf16_cache, "--output", tmp_path / "run", *options))
    assert report["step0"]["within_bound"]
    # Liger's kernels round differently from those that the cache was made with, and beta is 5.
    assert report["step0"]["loss"] == pytest.approx(math.log(2), abs=5e-2 if way == "liger" else 1e-2)
    assert metrics(tmp_path / "run")[-1]["train_loss"] < 0.69


def test_a_run_killed_and_resumed_goes_on(bf16_cache: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*RECIPE, "--max-steps", 8, "--checkpointing-steps", 3, "--num-gpus", 1)
    run(dpo_train("--cache", bf16_cache, "--output", whole, *options))
    command = dpo_train("--cache", bf16_cache, "--output", killed, *options)
    assert kill_when(command, (killed / "checkpoints/step_3/COMPLETE").exists)
    run([*command, "--resume"])
    for ours, theirs in zip(metrics(killed), metrics(whole), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
    ours_after, theirs_after = (load_file(folder / "model/model.safetensors") for folder in (killed, whole))
    for name, weight in theirs_after.items():  # a GPU sums in another order each time
        torch.testing.assert_close(ours_after[name], weight, rtol=2e-2, atol=2e-3)


def test_a_dry_run_holds_what_the_run_will_hold(bf16_cache: Path, tmp_path: Path) -> None:
    options = (*RECIPE, "--max-steps", 2, "--num-gpus", 1)
    dry = run(dpo_train("--cache", bf16_cache, "--output", tmp_path / "run", *options, "--dry-run"))
    run(dpo_train("--cache", bf16_cache, "--output", tmp_path / "run", *options))
    assert metrics(tmp_path / "run")[-1]["perf/peak_memory_gib"] <= 1.05 * dry["peak_memory_gib"]


def test_quantized_weights_are_scored_and_trained_on(reference: Path, pairs_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    cache = tmp_path / "cache"
    run(dpo_cache("build", "--model", reference, "--dataset", pairs_file, "--cache", cache, "--quantization", "nf4"))
    options = (*RECIPE, "--max-steps", 3, "--use-qlora", "--lora-rank", 4, "--zero-stage", 2, "--num-gpus", 1)
    report = run(dpo_train("--cache", cache, "--output", tmp_path / "run", *options, "--merge"))
    assert report["step0"]["within_bound"]
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == "llama"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_does(bf16_cache: Path, tmp_path: Path) -> None:
    lines = []
    for gpus in (1, 2):
        options = (*RECIPE, "--max-steps", 4, "--num-gpus", gpus)
        run(dpo_train("--cache", bf16_cache, "--output", tmp_path / str(gpus), *options))
        lines.append(metrics(tmp_path / str(gpus)))
    for ours, theirs in zip(*lines, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)

"""``dpo-cache doctor`` sees each problem and says what to do; a stand-in for each."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from dpo_cache.stages.doctor import DoctorReport, examine
from dpo_cache.stages.machine import doctor_devices, doctor_machine, doctor_services, doctor_software
from dpo_cache.stages.machine.finding import Finding, Level
from hub_server import TOKEN, HubServer, hub_server

GIB = 2**30
GPU = torch.device("cuda")


def one(findings: Iterator[Finding] | list[Finding], name: str) -> Finding:
    """The finding of that name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_a_machine_that_runs_the_tests_can_run_the_commands(tmp_path: Path) -> None:
    report = examine(tmp_path)
    assert report.can_run, report.text()
    assert max(map(len, report.text().splitlines())) <= 80 + len("\x1b[32m\x1b[0m")
    assert one(report.findings, "torch").value == torch.__version__


def test_one_fatal_finding_is_enough_and_is_named() -> None:
    fine = Finding(section="a", name="b", value="c", level=Level.WARNING, advice="d")
    broken = Finding(section="a", name="disk", value="full", level=Level.FATAL, advice="free some")
    assert DoctorReport(findings=[fine]).can_run
    report = DoctorReport(findings=[fine, broken])
    assert not report.can_run
    assert "because of: disk" in report.text()
    assert "-> free some" in report.text()
    assert report.to_json()["findings"][1] == {**asdict(broken), "level": "fatal"}


def _version_of(name: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> Finding:
    real = metadata.version

    def version_or_missing(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", version_or_missing)
    return one(doctor_software.examine_software(), name)


@pytest.mark.parametrize(
    ("name", "version", "level", "advice"),
    [
        ("datasets", None, Level.FATAL, "pip install 'datasets>="),
        ("datasets", "2.0.0", Level.FATAL, "pip install 'datasets>="),
        ("datasets", "99.0.0", Level.NOTE, "pip install datasets=="),
        ("peft", None, Level.NOTE, "--use-lora"),
        ("bitsandbytes", None, Level.NOTE, "--use-qlora"),
    ],
)
def test_packages_that_are_missing_old_or_untested(
    name: str, version: str | None, level: Level, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _version_of(name, version, monkeypatch)
    assert found.level is level
    assert advice in (found.advice or "")


def test_a_library_that_cannot_be_imported_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"lib{name}.so: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor_software, "importlib", SimpleNamespace(import_module=broken))
    found = one(doctor_software.examine_software(), "pyarrow")
    assert found.level is Level.FATAL
    assert found.value.endswith("cannot be imported: OSError: libpyarrow.so: cannot open shared object file")


def test_versions_are_read_from_the_constraints(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\ntorch==2.13.0\npeft==0.21.2  # adapters\n")
    assert doctor_software.tested_versions(constraints) == {"torch": "2.13.0", "peft": "0.21.2"}
    assert doctor_software.tested_versions(tmp_path / "none") == {}


def _gpus(monkeypatch: pytest.MonkeyPatch, *, count: int = 2, free: int = 140, nccl: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (free * GIB, 141 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)


def test_gpus_are_listed_with_what_joins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch)
    found = list(doctor_devices.examine_devices())
    assert one(found, "GPU 1").value == "NVIDIA H200, 140 of 141 GiB free"
    assert one(found, "collectives").value == "NCCL 2.29.3"
    assert one(found, "sdpa").value == "there"
    assert one(found, "flex_attention").value.endswith("; the default for heads of 64, 128, 256")
    assert not [finding for finding in found if finding.level is Level.FATAL]


def test_an_occupied_gpu_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, free=20)
    found = one(doctor_devices.examine_devices(), "GPU 0")
    assert found.level is Level.WARNING
    assert "nvidia-smi" in (found.advice or "")


def test_gpus_without_nccl_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, nccl=False)
    assert one(doctor_devices.examine_devices(), "collectives").level is Level.FATAL


def test_gpus_without_bfloat16_need_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert "--dtype float32" in (one(doctor_devices.examine_devices(), "bfloat16").advice or "")


def test_triton_without_a_compiler_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    found = one(doctor_devices.examine_devices(), "C compiler")
    assert found.level is Level.WARNING
    assert "gcc" in (found.advice or "")


@pytest.mark.parametrize(
    ("visible", "cuda", "advice"),
    [("", "13.0", "unset CUDA_VISIBLE_DEVICES"), (None, None, "pytorch.org"), (None, "13.0", "update the driver")],
)
def test_gpus_that_torch_cannot_see_are_told_why(
    visible: str | None, cuda: str | None, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    driver.touch()
    monkeypatch.setattr(doctor_devices, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = one(doctor_devices.examine_devices(), "GPUs")
    assert found.level is Level.WARNING, "the commands run all the same, on the CPU"
    assert advice in (found.advice or "")


@pytest.mark.parametrize(("free_gib", "level"), [(0.5, Level.FATAL), (10, Level.WARNING), (500, Level.OK)])
def test_a_full_disk_is_fatal_and_a_small_one_a_warning(
    free_gib: float, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=1000 * GIB, free=int(free_gib * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    found = list(doctor_machine.examine_machine(tmp_path / "not there yet"))
    assert one(found, "this folder").level is level
    assert "HF_HOME" in (one(found, "models, datasets").advice or "HF_HOME")


def test_a_folder_that_cannot_be_written_to_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)
    assert one(doctor_machine.examine_machine(tmp_path), "this folder").level is Level.FATAL


def test_a_home_that_this_user_may_not_look_into_is_a_finding_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container under another number than root's: the report on it is what doctor is for."""
    private = tmp_path / "home"
    private.mkdir()
    look, may_use = os.stat, os.access

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{private}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != private and may_use(path, mode))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(private / "hub"))
    found = list(doctor_machine.examine_machine(tmp_path))
    models = one(found, "models, datasets")
    assert (models.level, models.value) == (Level.FATAL, f"{private} cannot be written to")


def test_a_file_system_that_gives_no_numbers_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=0, free=0))
    assert one(doctor_machine.examine_machine(tmp_path), "this folder").level is Level.OK


def test_little_memory_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    2000000 kB\n")
    monkeypatch.setattr(doctor_machine, "MEMORY_INFO", info)
    found = one(doctor_machine.examine_machine(tmp_path), "memory")
    assert (found.level, found.value) == (Level.WARNING, "1.9 of 15.3 GiB available")


@pytest.mark.parametrize(("gpus", "level"), [(8, Level.WARNING), (1, Level.NOTE)])
def test_little_shared_memory_matters_where_gpus_talk(
    gpus: int, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert one(doctor_machine.examine_machine(tmp_path), "/dev/shm").level is level


@pytest.mark.parametrize(("hard", "advice"), [(524288, "ulimit -n 4096"), (2048, "ulimit -n 2048"), (256, "limits")])
def test_a_low_limit_of_open_files_comes_with_the_command(
    hard: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, hard))
    found = one(doctor_machine.examine_machine(tmp_path), "open files")
    assert found.level is Level.WARNING
    assert advice in (found.advice or "")


def test_more_threads_than_processors_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert "unset OMP_NUM_THREADS" in (one(doctor_machine.examine_machine(tmp_path), "CPU threads").advice or "")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine that this process asks."""
    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


def test_a_login_is_named_and_its_token_is_not(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = list(doctor_services.examine_services())
    assert one(found, "Hub").value == f"{hub.url} answers"
    assert one(found, "Hub login").value == "tester"


def test_a_refused_token_is_not_repeated(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    report = DoctorReport(findings=list(doctor_services.examine_services()))
    found = one(report.findings, "Hub login")
    assert found.level is Level.WARNING
    assert "status 401" in found.value
    assert "hf auth login" in (found.advice or "")
    assert secret not in report.text() + json.dumps(report.to_json())


def test_no_login_is_a_note(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert one(doctor_services.examine_services(), "Hub login").level is Level.NOTE


def test_a_read_only_token_is_told_apart(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    user = {"name": "tester", "auth": {"accessToken": {"role": "read"}}}
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda _api: user)
    found = one(doctor_services.examine_services(), "Hub login")
    assert (found.level, found.value) == (Level.NOTE, "tester, read-only")


def test_a_hub_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_services, "PATIENCE_S", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = one(doctor_services.examine_services(), "Hub")
    assert found.level is Level.WARNING
    assert "local folders and files work without" in (found.advice or "")


def test_offline_is_a_choice_and_not_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert one(doctor_services.examine_services(), "Hub").level is Level.NOTE


@pytest.mark.parametrize(
    ("login", "value", "level"),
    [
        (lambda **_: True, "an API key is there", Level.OK),
        (lambda **_: False, "none", Level.NOTE),
        (lambda **_: 1 / 0, "unknown: ZeroDivisionError", Level.NOTE),
    ],
)
def test_wandb_is_asked_without_a_prompt(
    login: Callable[..., Any], value: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "setup", lambda _settings: None)
    monkeypatch.setattr(wandb, "login", login)
    found = one(doctor_services.examine_services(), "wandb login")
    assert (found.value, found.level) == (value, level)


def test_the_command_prints_one_object_and_fails_where_a_stage_would(tmp_path: Path) -> None:
    """A package that hides pyarrow stands in for a broken installation."""
    (tmp_path / "pyarrow.py").write_text("raise ImportError('built for another Python')")
    done = subprocess.run(
        [sys.executable, "-m", "dpo_cache", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", "WANDB_API_KEY": "k" * 40},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert not report["can_run"]
    (broken,) = [found for found in report["findings"] if found["name"] == "pyarrow"]
    assert broken["level"] == "fatal"
    assert "built for another Python" in broken["value"]
    assert "k" * 40 not in done.stdout + done.stderr

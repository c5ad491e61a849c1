"""Caches on a Hub, on web servers and in buckets: the real clients, servers of our own that fail on purpose."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dpo_cache.pipeline.cache.remote_files as remote_files
import duckdb
import fsspec
import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from click.testing import CliRunner
from commands import dpo_cache, dpo_train, kill_when, metrics, run
from dpo_cache import cli
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.canonical_json import write_sealed_json
from dpo_cache.pipeline.cache.mixture import Mixture
from dpo_cache.pipeline.cache.remote_files import MAX_LIST_BYTES
from dpo_cache.stages.addresses.local_copy import local_copy
from dpo_cache.stages.compact import compact
from dpo_cache.stages.gc import collect_garbage
from dpo_cache.stages.hub.hub_dataset import HubDataset
from dpo_cache.stages.info import cache_info
from dpo_cache.stages.pull import pull
from dpo_cache.stages.push import push
from dpo_cache.stages.show import show
from dpo_cache.stages.train import train
from dpo_cache.stages.training.train_config import TrainConfig
from dpo_cache.stages.verify import verify_cache
from file_server import FileServer, file_server
from homeless_user import leave_without_home
from hub_server import TOKEN, Files, HubServer, hub_server

ROWS, SHARD_ROWS = 50, 10


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        server.use_here(monkeypatch)
        yield server


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FileServer]:
    folder = tmp_path / "web"
    folder.mkdir()
    with file_server(folder) as server:
        yield server


def make_shared(path: Path, *, rows: int = ROWS, name: str = "train", seed: int = 0) -> Mixture:
    """A cache with a mixture of five shards, and one shard that no mixture names."""
    cache = make_cache(path)
    mixture = fill_cache(cache, make_rows(rows, seed=seed), shard_rows=SHARD_ROWS, name=name)
    cache.shards.write(make_rows(3, seed=99))
    return mixture


def content(path: Path) -> Files:
    """What a cache holds, without what no mixture names."""
    cache = ReferenceCache.open(path)
    named = {shard.file_name for name in cache.mixture_names() for shard in cache.read_mixture(name).shards}
    files = [file for file in path.rglob("*") if file.is_file() and "tmp" not in file.relative_to(path).parts]
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in files
        if file.parent.name != "shards" or file.name in named
    }


def spoil(content: bytes) -> bytes:
    """One bit flipped, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def no_mixture_can_be_used(path: Path) -> bool:
    return not (path / "cache.json").exists() or not ReferenceCache.open(path).mixture_names()


# ---- to the Hub and back ---------------------------------------------------------------------------------------------


def test_what_is_pulled_is_byte_for_byte_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    make_shared(tmp_path / "ours")
    report = push(tmp_path / "ours", "lab/cache")
    assert (report.shards, report.uploaded, report.private) == (5, 5, True)
    there = hub.files["lab/cache", "main"]
    assert set(there) == {*content(tmp_path / "ours"), "README.md"}, "not only what a mixture names, and the card"

    pulled = pull("lab/cache", tmp_path / "theirs", revision=None)
    assert (pulled.fetched, pulled.mixtures) == (5, {"train": ROWS})
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    assert not list((tmp_path / "theirs/tmp").glob("fetch/*"))
    assert verify_cache(tmp_path / "theirs").is_sound


def test_permission_is_asked_before_anything_is_sent_and_every_commit_is_a_whole_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.stages.hub.hub_dataset.BATCH_FILES", 2)
    make_shared(tmp_path / "ours")
    push(tmp_path / "ours", "lab/cache", revision="v1")
    asked, first_upload = hub.requests, next(n for n, request in enumerate(hub.requests) if "preupload" in request)
    assert "GET /api/datasets/lab/cache/auth-check/write" in asked[:first_upload]
    assert len(hub.commits) > 3, "shards did not go in batches"
    for files in hub.commits.values():
        for pointer in (json.loads(files[name]) for name in files if name.startswith("mixtures/") and "json" in name):
            assert f"mixtures/{pointer['table']['sha256']}.parquet" in files
            assert {f"shards/{digest}.parquet" for digest, *_ in pointer["shards"]} <= files.keys()
    assert "mixtures/train.json" in hub.files["lab/cache", "v1"]
    assert "hf://datasets/lab/cache@v1" in hub.files["lab/cache", "v1"]["README.md"].decode()
    assert pull("lab/cache", tmp_path / "theirs", revision="v1").fetched == 5


def test_a_push_to_a_branch_with_a_slash_prints_an_address_that_names_it(hub: HubServer, tmp_path: Path) -> None:
    make_shared(tmp_path / "ours")
    report = push(tmp_path / "ours", "lab/cache", revision="runs/first")
    (address,) = re.findall(r"hf://\S+", report.text())
    assert address == "hf://datasets/lab/cache@runs%2Ffirst"
    assert list(cache_info(address).mixtures) == ["train"]


def test_who_may_not_write_is_told_before_a_byte_is_hashed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shared(tmp_path / "ours")
    hub.may_write = False
    monkeypatch.setattr("dpo_cache.stages.push.check_mixture", lambda *_: pytest.fail("looked at the shards"))
    with pytest.raises(DpoCacheError, match="nothing can be uploaded to lab/cache: 403"):
        push(tmp_path / "ours", "lab/cache")
    assert not hub.asked("preupload")


def test_a_shard_that_has_gone_bad_is_not_shared(hub: HubServer, tmp_path: Path) -> None:
    mixture = make_shared(tmp_path / "ours")
    victim = tmp_path / "ours/shards" / mixture.shards[1].file_name
    victim.write_bytes(spoil(victim.read_bytes()))
    with pytest.raises(DpoCacheError, match=f"{victim.name} is damaged"):
        push(tmp_path / "ours", "lab/cache")
    assert not hub.large


def test_an_upload_that_broke_off_goes_on_and_leaves_no_pointer_before(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.stages.hub.hub_dataset.BATCH_FILES", 2)
    make_shared(tmp_path / "ours")
    hub.accept_uploads = 3
    with pytest.raises(DpoCacheError, match="failed") as failure:
        push(tmp_path / "ours", "lab/cache")
    assert failure.value.next_step == "the same command goes on from there"
    assert not [name for name in hub.files["lab/cache", "main"] if name.startswith("mixtures/")]

    hub.accept_uploads = None
    hub.requests.clear()
    report = push(tmp_path / "ours", "lab/cache")
    assert report.uploaded == 3, "a batch of two had been committed"
    assert len(hub.asked("PUT /large/")) == 3, "two shards and the table: one shard of a broken batch had arrived"
    assert pull("lab/cache", tmp_path / "theirs", revision=None).mixtures == {"train": ROWS}


def test_what_a_build_makes_of_a_mixture_during_an_upload_is_not_uploaded(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the shards and the pointers hours may pass; meanwhile nothing that is being sent may be deleted."""
    make_shared(tmp_path / "ours")
    began_with = content(tmp_path / "ours")
    upload_shards = HubDataset.upload_shards

    def slowly(repository: HubDataset, cache: ReferenceCache, shards: Any) -> None:
        upload_shards(repository, cache, shards)
        with cache.building("train"):
            fill_cache(cache, make_rows(ROWS + 20), shard_rows=SHARD_ROWS)
        for delete in (compact, lambda path: collect_garbage(path, min_age_days=0, agree=lambda _: True)):
            with pytest.raises(DpoCacheError, match="is in use by an upload"):
                delete(cache.path)

    monkeypatch.setattr(HubDataset, "upload_shards", slowly)
    assert push(tmp_path / "ours", "lab/cache").mixtures == {"train": ROWS}
    there = {name: data for name, data in hub.files["lab/cache", "main"].items() if name != "README.md"}
    assert there == began_with
    assert ReferenceCache.open(tmp_path / "ours").read_mixture("train").num_pairs == ROWS + 20


def test_a_mixture_that_somebody_else_pushes_during_an_upload_stays_on_the_card(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shared(tmp_path / "ours")
    other = make_cache(tmp_path / "other")
    fill_cache(other, make_rows(20, seed=7), shard_rows=SHARD_ROWS, name="held-out")
    upload_shards = HubDataset.upload_shards

    def meanwhile(repository: HubDataset, cache: ReferenceCache, shards: Any) -> None:
        monkeypatch.setattr(HubDataset, "upload_shards", upload_shards)
        push(other.path, "lab/cache")
        upload_shards(repository, cache, shards)

    monkeypatch.setattr(HubDataset, "upload_shards", meanwhile)
    push(tmp_path / "ours", "lab/cache")
    card = hub.files["lab/cache", "main"]["README.md"].decode()
    assert "| held-out | 20 |" in card
    assert f"| train | {ROWS} |" in card


def test_names_of_local_folders_are_warned_about_whatever_they_are_names_of(hub: HubServer, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "ours")
    rows = make_rows(4)
    cache.shards.write(rows)
    settings = {"tokenizer": "/home/me/tokenizer", "chat_template": "./mine.jinja"}
    cache.write_mixture(
        "train",
        mixture_rows(rows),
        key_index=cache.shards.key_index(),
        tokenization={"settings": settings},
        sources=[{"path": "org/pairs"}],
        dropped={},
    )
    (warning,) = push(cache.path, "lab/cache").warnings
    assert "/home/me/tokenizer, ./mine.jinja;" in warning
    assert "org/pairs" not in warning


def test_pushing_again_changes_nothing_and_another_mixture_joins_under_the_same_card(
    hub: HubServer, tmp_path: Path
) -> None:
    make_shared(tmp_path / "ours")
    push(tmp_path / "ours", "lab/cache")
    commits = len(hub.commits)
    assert push(tmp_path / "ours", "lab/cache").uploaded == 0
    assert len(hub.commits) == commits

    card = hub.files["lab/cache", "main"]["README.md"].decode()
    mine = card.replace("---\n", "---\nlicense: odc-by\n", 1).replace("None is stated here yet", "ODC-BY, says the lab")
    hub.commit("lab/cache", "main", {"README.md": mine.encode()})
    other = make_cache(tmp_path / "other")
    fill_cache(other, make_rows(20, seed=7), shard_rows=SHARD_ROWS, name="held-out")
    assert push(tmp_path / "other", "lab/cache").uploaded == 2
    joined = hub.files["lab/cache", "main"]["README.md"].decode()
    assert "\nlicense: odc-by\n" in joined
    assert "ODC-BY, says the lab" in joined
    assert "| held-out | 20 |" in joined
    assert f"| train | {ROWS} |" in joined
    assert "mixture-held-out" in joined
    assert pull("lab/cache", tmp_path / "both", revision=None).mixtures == {"held-out": 20, "train": ROWS}
    only = pull("lab/cache", tmp_path / "one", revision=None, mixture_names=["held-out"])
    assert (only.mixtures, only.fetched) == ({"held-out": 20}, 2)


def test_nothing_is_sent_to_a_public_repository_or_one_of_another_reference(hub: HubServer, tmp_path: Path) -> None:
    make_shared(tmp_path / "ours")
    push(tmp_path / "ours", "lab/open", public=True)
    assert hub.private["lab/open"] is False
    hub.requests.clear()
    with pytest.raises(DpoCacheError, match="lab/open is there already, and it is public"):
        push(tmp_path / "ours", "lab/open")
    other = make_cache(tmp_path / "other", weights_sha256="c" * 64)
    fill_cache(other, make_rows(10), shard_rows=SHARD_ROWS)
    with pytest.raises(DpoCacheError, match=r"another reference .*weights_sha256"):
        push(tmp_path / "other", "lab/open", public=True)
    assert not hub.asked("preupload")


def test_the_card_shows_no_token_and_no_path_and_its_code_runs(
    hub: HubServer, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = push(shared_cache, "lab/cache")
    assert "folders of this machine" in report.warnings[0]
    there = hub.files["lab/cache", "main"]
    card = there["README.md"].decode()
    assert not [name for name in there if TOKEN.encode() in there[name]]
    for secret in (str(shared_cache), str(shared_cache.parent.parent), os.environ["XDG_CACHE_HOME"]):
        assert secret not in card
    cache = ReferenceCache.open(shared_cache)
    assert f"| identity | `{cache.reference_id}` |" in card
    assert f"| train | {cache.read_mixture('train').num_pairs} |" in card

    query = card.partition("```sql")[2].partition("```")[0].replace("hf://datasets/lab/cache", str(shared_cache))
    rows = duckdb.connect().execute(query).fetchall()
    assert len(rows) == cache.read_mixture("train").num_pairs

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    code = card.partition("```python")[2].partition("```")[0]
    script = tmp_path / "read_it.py"
    script.write_text(code + "print(json.dumps({'rows': len(pairs), 'columns': pairs.column_names}))\n")
    script.write_text("import json\n" + script.read_text())
    environment = {
        **hub.environment,
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
    }
    loaded = run([sys.executable, str(script)], environment=environment)
    assert loaded["rows"] == len(rows)
    assert {"example_key", "prompt_ids", "ref_chosen_logps"} <= set(loaded["columns"])


# ---- pulling what is damaged, half there, or not meant for this folder -----------------------------------------------


def test_a_damaged_shard_is_named_and_the_next_pull_fetches_just_that(web: FileServer, tmp_path: Path) -> None:
    mixture = make_shared(web.folder / "cache")
    victim = web.folder / "cache/shards" / mixture.shards[2].file_name
    sound = victim.read_bytes()
    victim.write_bytes(spoil(sound))
    address, copy = f"{web.url}/cache", tmp_path / "copy"
    with pytest.raises(DpoCacheError, match=f"1 of 5 shards .*{address}/shards/{victim.name} is damaged"):
        pull(address, copy, revision=None)
    assert no_mixture_can_be_used(copy)
    assert victim.name not in {path.name for path in (copy / "shards").iterdir()}
    with pytest.raises(DpoCacheError, match=victim.name):
        local_copy(address)

    victim.write_bytes(sound)
    assert pull(address, copy, revision=None).fetched == 1
    assert content(copy) == content(web.folder / "cache")


@pytest.mark.parametrize("victim", ["cache.json", "mixtures/train.json", "table"])
def test_damage_in_the_small_files_is_found_before_anything_can_be_used(
    web: FileServer, tmp_path: Path, victim: str
) -> None:
    mixture = make_shared(web.folder / "cache")
    path = mixture.table.path if victim == "table" else web.folder / "cache" / victim
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DpoCacheError, match=f"{web.url}/cache/.*{path.name} is damaged"):
        pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    assert no_mixture_can_be_used(tmp_path / "copy")


def test_names_in_a_strangers_pointer_cannot_leave_the_folder(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    source = web.folder / "cache/mixtures/train.json"
    pointer = {name: value for name, value in json.loads(source.read_bytes()).items() if name != "sha256"}
    outside = "../../../outside"
    for change in ({"shards": [[outside, 10, 10]]}, {"table": {"sha256": outside, "num_bytes": 10}}):
        write_sealed_json(source, pointer | change, temporary_folder=web.folder)
        with pytest.raises(DpoCacheError, match="not a SHA-256"):
            pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    assert not web.shard_requests()
    with pytest.raises(DpoCacheError, match="cannot name a mixture"):
        pull(f"{web.url}/cache", tmp_path / "copy", revision=None, mixture_names=["../../x"])


def test_a_pointer_that_means_other_rows_than_its_table_is_refused(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    source = web.folder / "cache/mixtures/train.json"
    pointer = {name: value for name, value in json.loads(source.read_bytes()).items() if name != "sha256"}
    write_sealed_json(source, pointer | {"digest": "d" * 64}, temporary_folder=web.folder)
    with pytest.raises(DpoCacheError, match="not the training set"):
        pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    assert no_mixture_can_be_used(tmp_path / "copy")


@pytest.mark.parametrize("victim", ["cache.json", "mixtures/train.json", "table", "shard"])
def test_a_server_that_sends_without_end_is_left_once_a_file_is_larger_than_it_may_be(
    web: FileServer, tmp_path: Path, victim: str
) -> None:
    mixture = make_shared(web.folder / "cache")
    names = {"table": f"mixtures/{mixture.table.path.name}", "shard": f"shards/{mixture.shards[3].file_name}"}
    name = names.get(victim, victim)
    web.endless.add(f"/cache/{name}")
    with pytest.raises(DpoCacheError, match=f"{name} has more bytes than it may have"):
        pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    bound = {"cache.json": 4, "mixtures/train.json": 64}.get(victim, 0)
    assert web.sent_bytes < (bound + 32) << 20, "what is on its way when the other side hangs up, and no more"
    assert no_mixture_can_be_used(tmp_path / "copy")


def test_a_list_without_end_is_not_read_into_memory(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    web.endless |= {"/cache/mixtures", "/cache/mixtures/"}
    with pytest.raises(DpoCacheError, match=r"the list of .*/cache/mixtures has no end"):
        cache_info(f"{web.url}/cache")
    assert web.sent_bytes < MAX_LIST_BYTES + (32 << 20)


def test_a_file_that_its_server_says_is_too_large_is_not_begun(hub: HubServer, tmp_path: Path) -> None:
    mixture = make_shared(tmp_path / "ours")
    push(tmp_path / "ours", "lab/cache")
    victim = f"shards/{mixture.shards[0].file_name}"
    grown = hub.files["lab/cache", "main"][victim] + bytes(1000)
    hub.commit("lab/cache", "main", {victim: grown})
    hub.requests.clear()
    with pytest.raises(DpoCacheError, match=f"{victim} has {len(grown):,} bytes"):
        pull("lab/cache", tmp_path / "theirs", revision=None)
    assert not [request for request in hub.asked(victim) if request.startswith("GET") and "resolve" in request]
    copied = shutil.copytree(tmp_path / "ours", tmp_path / "local")
    (copied / victim).write_bytes(grown)
    with pytest.raises(DpoCacheError, match=f"{victim} has {len(grown):,} bytes"):
        pull(f"file://{copied}", tmp_path / "theirs-too", revision=None)
    (copied / victim).unlink()
    (copied / victim).symlink_to("/dev/zero")
    with pytest.raises(DpoCacheError, match=f"{victim} is not a regular file"):
        pull(f"file://{copied}", tmp_path / "theirs-too", revision=None)


def test_a_killed_pull_goes_on_where_it_was(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    copy = tmp_path / "copy"
    web.hold_after = 2
    killed = kill_when(
        dpo_cache("pull", f"{web.url}/cache", copy),
        lambda: (copy / "shards").exists() and len(list((copy / "shards").iterdir())) == 2,
    )
    assert killed, "it was too quick to be killed"
    assert no_mixture_can_be_used(copy)
    web.hold.set()
    assert pull(f"{web.url}/cache", copy, revision=None).fetched == 3
    assert content(copy) == content(web.folder / "cache")
    assert not (copy / "tmp/fetch").exists()


def test_a_pull_from_a_server_that_has_fallen_silent_stops_when_it_is_asked_to(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    web.hold_after = 2
    copy = tmp_path / "copy"
    with subprocess.Popen(
        dpo_cache("pull", f"{web.url}/cache", copy, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        while web.shard_requests().total() < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        try:
            said, _ = process.communicate(timeout=60)  # the server answers only after this test
        finally:
            process.kill()
    assert process.returncode == 1
    assert json.loads(said)["error"]["found"] == "stopped"
    assert not (copy / "tmp/fetch").exists()
    assert no_mixture_can_be_used(copy)


def test_a_connection_that_drops_is_tried_again_and_one_that_always_drops_is_given_up(
    web: FileServer, tmp_path: Path
) -> None:
    make_shared(web.folder / "cache")
    web.drop = 2
    assert pull(f"{web.url}/cache", tmp_path / "copy", revision=None).fetched == 5
    assert web.drop == 0
    web.drop = 10_000
    with pytest.raises(DpoCacheError, match="cannot be read") as failure:
        pull(f"{web.url}/cache", tmp_path / "other", revision=None)
    assert "goes on from there" in str(failure.value)
    assert no_mixture_can_be_used(tmp_path / "other")


def test_a_download_from_the_hub_that_breaks_off_goes_on(hub: HubServer, tmp_path: Path) -> None:
    make_shared(tmp_path / "ours")
    push(tmp_path / "ours", "lab/cache")
    hub.drop_downloads = 1
    assert pull("lab/cache", tmp_path / "theirs", revision=None).fetched == 5
    assert hub.drop_downloads == 0
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    with pytest.raises(DpoCacheError, match="there is no hf://datasets/lab/none"):
        pull("lab/none", tmp_path / "none", revision=None)
    with pytest.raises(DpoCacheError, match="there is no hf://datasets/lab/cache@v9"):
        pull("lab/cache", tmp_path / "none", revision="v9")


def test_a_folder_with_another_reference_or_training_set_is_not_overwritten(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    other = make_cache(tmp_path / "other", weights_sha256="c" * 64)
    fill_cache(other, make_rows(10), shard_rows=SHARD_ROWS)
    before = content(tmp_path / "other")
    with pytest.raises(DpoCacheError, match=r"another reference .*weights_sha256"):
        pull(f"{web.url}/cache", tmp_path / "other", revision=None)
    assert content(tmp_path / "other") == before

    make_shared(tmp_path / "namesake", rows=20, seed=3)
    before = content(tmp_path / "namesake")
    with pytest.raises(DpoCacheError, match="another training set"):
        pull(f"{web.url}/cache", tmp_path / "namesake", revision=None)
    assert content(tmp_path / "namesake") == before
    assert pull(f"{web.url}/cache", tmp_path / "namesake", revision=None, replace=True).mixtures == {"train": ROWS}

    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").write_text("…")
    with pytest.raises(DpoCacheError, match="not a cache and not empty"):
        pull(f"{web.url}/cache", tmp_path / "papers", revision=None)
    assert len(list((tmp_path / "papers").iterdir())) == 1


def test_a_full_disk_ends_a_pull_at_once(web: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shared(web.folder / "cache")
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1000, free=1000))
        with pytest.raises(DpoCacheError, match="GiB are free"):
            pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    assert not web.shard_requests()


def test_a_disk_that_fills_up_meanwhile_is_no_reason_to_try_again(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    files = remote_files.RemoteFiles.open(f"{web.url}/cache")
    with pytest.raises(DpoCacheError, match="cannot write /dev/full: No space left on device"):
        files.fetch("cache.json", Path("/dev/full"), max_bytes=1 << 20)
    assert web.requests["/cache/cache.json"] == 1


def test_a_pull_mends_a_shard_that_has_gone_bad_here(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    pull(f"{web.url}/cache", tmp_path / "copy", revision=None)
    victim = next((tmp_path / "copy/shards").iterdir())
    victim.write_bytes(spoil(victim.read_bytes()))
    assert pull(f"{web.url}/cache", tmp_path / "copy", revision=None).fetched == 1
    assert verify_cache(tmp_path / "copy").is_sound


# ---- reading at an address -------------------------------------------------------------------------------------------


def test_shards_are_fetched_once_ever_and_pointers_each_time(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    first = local_copy(f"{web.url}/cache", ["train"])
    assert content(first) == content(web.folder / "cache")
    assert set(web.shard_requests().values()) == {1}
    again = local_copy(f"{web.url}/cache", ["train"])
    assert again == first
    assert set(web.shard_requests().values()) == {1}
    assert web.requests["/cache/mixtures/train.json"] == 2

    fill_cache(ReferenceCache.open(web.folder / "cache"), make_rows(20, seed=5), shard_rows=SHARD_ROWS)
    local_copy(f"{web.url}/cache", ["train"])
    assert ReferenceCache.open(first).read_mixture("train").num_pairs == 20
    assert len(web.shard_requests()) == 7
    assert set(web.shard_requests().values()) == {1}


def test_a_user_without_a_home_is_told_where_to_keep_what_is_fetched(
    web: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shared(web.folder / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(DpoCacheError, match="cannot make the folder /proc/nowhere") as refused:
        local_copy(f"{web.url}/cache", ["train"])
    assert "set XDG_CACHE_HOME" in (refused.value.next_step or "")
    leave_without_home(monkeypatch)
    with pytest.raises(DpoCacheError, match="no home folder") as homeless:
        local_copy(f"{web.url}/cache", ["train"])
    assert "set XDG_CACHE_HOME" in (homeless.value.next_step or "")


def test_two_addresses_of_one_cache_share_its_shards_on_disk(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    local_copy(f"{web.url}/cache", ["train"])
    (web.folder / "mirror").symlink_to(web.folder / "cache")
    copy = local_copy(f"{web.url}/mirror", ["train"])
    assert not [path for path in web.shard_requests() if path.startswith("/mirror")]
    assert {path.stat().st_nlink for path in (copy / "shards").iterdir()} == {2}


def test_processes_that_ask_at_once_fetch_once(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    with ThreadPoolExecutor(4) as ranks:
        copies = list(ranks.map(lambda _: local_copy(f"{web.url}/cache", ["train"]), range(4)))
    assert len(set(copies)) == 1
    assert set(web.shard_requests().values()) == {1}
    assert content(copies[0]) == content(web.folder / "cache")


def test_looking_reads_no_more_than_it_shows(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    address = f"{web.url}/cache"
    report = cache_info(address)
    assert (report.shards, report.mixtures["train"].num_pairs) == (5, ROWS)
    assert report.to_json()["path"] == address
    assert not web.shard_requests()
    shown = show(address, count=1, mixture_name=None, key=None)
    assert len(shown.pairs) == 1
    assert len(web.shard_requests()) == 1
    key = shown.pairs[0].row.key.hex()
    assert show(address, mixture_name="train", key=key[:12]).pairs[0].row.key.hex() == key
    assert verify_cache(address).is_sound
    with pytest.raises(DpoCacheError, match="read-only"):
        verify_cache(address, repair=True)


def test_verifying_an_address_fetches_again_what_this_disk_has_damaged(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    copy = local_copy(f"{web.url}/cache", ["train"])
    damaged = [next((copy / folder).glob("*.parquet")) for folder in ("shards", "mixtures")]
    for path in damaged:
        content_before = bytearray(path.read_bytes())
        content_before[len(content_before) // 2] ^= 1
        path.write_bytes(content_before)
    assert verify_cache(f"{web.url}/cache").is_sound
    assert content(copy) == content(web.folder / "cache")
    assert web.shard_requests().total() == 6
    lost = web.folder / "cache/shards" / damaged[0].name
    lost.write_bytes(lost.read_bytes()[:-1])
    damaged[0].write_bytes(b"")
    with pytest.raises(DpoCacheError, match="1 of 1 shards could not be fetched"):
        verify_cache(f"{web.url}/cache")


def test_a_server_that_lists_nothing_serves_the_mixtures_one_names(web: FileServer, tmp_path: Path) -> None:
    make_shared(web.folder / "cache")
    web.lists_folders = False
    assert content(local_copy(f"{web.url}/cache", ["train"])) == content(web.folder / "cache")
    with pytest.raises(DpoCacheError, match="does not list folders"):
        verify_cache(f"{web.url}/cache")
    with pytest.raises(DpoCacheError, match="no mixture 'other'"):
        local_copy(f"{web.url}/cache", ["other"])
    assert pull(f"{web.url}/cache", tmp_path / "copy", revision=None, mixture_names=["train"]).fetched == 5


def test_a_mixture_that_is_gone_there_cannot_be_used_here(web: FileServer) -> None:
    make_shared(web.folder / "cache")
    copy = local_copy(f"{web.url}/cache")
    fill_cache(ReferenceCache.open(web.folder / "cache"), make_rows(20, seed=5), shard_rows=SHARD_ROWS, name="new")
    (web.folder / "cache/mixtures/train.json").unlink()
    assert local_copy(f"{web.url}/cache") == copy
    assert ReferenceCache.open(copy).mixture_names() == ["new"]


def test_a_bucket_is_read_as_a_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer("127.0.0.1", port=0)
    make_shared(tmp_path / "ours")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("pairs")
        bucket.put(str(tmp_path / "ours"), "pairs/caches/tulu", recursive=True)
        assert content(local_copy("s3://pairs/caches/tulu", ["train"])) == content(tmp_path / "ours")
        assert cache_info("s3://pairs/caches/tulu").shards == 5
        with pytest.raises(DpoCacheError, match="no mixture 'other'") as missing:
            local_copy("s3://pairs/caches/tulu", ["other"])
        assert missing.value.expected == "one of: train"
        with pytest.raises(DpoCacheError, match="there is no cache at s3://pairs/none"):
            local_copy("s3://pairs/none", ["train"])
    finally:
        server.stop()


def test_memory_and_file_addresses_are_read_too(tmp_path: Path) -> None:
    make_shared(tmp_path / "ours")
    fsspec.filesystem("memory").put(str(tmp_path / "ours"), "/ours", recursive=True)
    assert content(local_copy("memory://ours")) == content(tmp_path / "ours")
    assert content(local_copy(f"file://{tmp_path}/ours")) == content(tmp_path / "ours")
    assert local_copy(tmp_path / "ours") == tmp_path / "ours"


def test_what_a_protocol_needs_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = sys.modules["fsspec.registry"]._registry  # the package has a mapping of this name
    for protocol, package in (("gs", "gcsfs"), ("s3", "s3fs"), ("https", "aiohttp")):
        monkeypatch.delitem(loaded, protocol, raising=False)  # by another test
        monkeypatch.setitem(sys.modules, package, None)
    for address, extra in (("gs://a/b", "gcs"), ("s3://a/b", "s3"), ("https://127.0.0.1:1/b", "http")):
        with pytest.raises(DpoCacheError, match=f"{address} cannot be read") as failure:
            local_copy(address)
        assert failure.value.next_step == f"pip install 'dpo-cache[{extra}]'"
    with pytest.raises(DpoCacheError, match="cannot be read") as failure:
        local_copy("gopher://a/b")
    assert failure.value.next_step is None


def test_an_address_never_carries_a_secret() -> None:
    for address in (
        *("https://me:secret@127.0.0.1/cache", "http://hf_secret@127.0.0.1/cache", "s3://KEY:secret@127.0.0.1/cache"),
        *("s3://secret@127.0.0.1/cache", "https://127.0.0.1/cache?signature=secret"),
    ):
        with pytest.raises(DpoCacheError, match=r"^the address of 127.0.0.1 carries a ") as failure:
            local_copy(address)
        assert "secret" not in str(failure.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--model", "m", "--dataset", "d", "--cache", "s3://a/b"],
        ["gc", "s3://a/b"],
        ["compact", "hf://datasets/a/b"],
        ["merge", "s3://a/b", "--cache", "here"],
        ["merge", "here", "--cache", "s3://a/b"],
        ["explain", "https://a/b", "--model", "m", "--dataset", "d"],
        ["push", "hf://datasets/a/b", "c/d"],
        ["pull", "a/b", "s3://c/d"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_writes_refuses_an_address(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.dpo_cache, arguments)
    assert result.exit_code == 2, result.output
    assert "read-only" in result.output
    assert "s3:/a" not in result.output


def test_training_from_an_address_is_training_from_the_folder(
    web: FileServer, shared_cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared_cache, web.folder / "cache")
    address, output = f"{web.url}/cache", tmp_path / "run"
    plans = [train(TrainConfig(cache=place, output=output, plan=True)) for place in (address, shared_cache)]
    assert plans[0] == plans[1]
    assert not web.shard_requests()
    with pytest.raises(DpoCacheError, match=f"there is no cache at {web.url}/none"):
        train(TrainConfig(cache=f"{web.url}/none", output=output, plan=True))

    recipe = ("--global-batch-size", 8, "--max-steps", 2, "--learning-rate", 1e-3)
    report = run(dpo_train("--cache", address, "--output", output, *recipe, "--num-gpus", 2))
    assert report["steps"] == 2
    assert metrics(output)[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5), "not the values of this reference"
    assert set(web.shard_requests().values()) == {1}, "both ranks and their parent share one copy"
    assert json.loads((output / "config.json").read_text())["settings"]["cache"] == address

"""A cache belongs to one reference, keeps its files to itself, and says what is wrong with it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_factory import fill_cache, make_cache, make_identity, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.pipeline.cache.canonical_json import read_sealed_json, write_sealed_json
from dpo_cache.pipeline.cache.mixture_check import check_mixture


def test_a_cache_is_opened_as_it_was_made_and_holds_nothing_but_its_four_parts(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "new" / "cache")
    fill_cache(made, make_rows(10), shard_rows=5)
    opened = ReferenceCache.open(made.path)
    assert opened.identity == made.identity == make_identity()
    assert opened.reference_id == make_identity().digest
    assert opened.vocabulary_sha256 == "b" * 64
    assert opened.recorded == {"model": "made up"}
    (made.path / "mixtures" / ".train.json.swp.json").touch()
    assert opened.mixture_names() == ["train"]
    assert sorted(os.listdir(made.path)) == ["cache.json", "mixtures", "shards", "tmp"]
    assert all(path.name.endswith(".lock") for path in (made.path / "tmp").iterdir())
    assert len(opened.shards.key_index()) == 10


def test_a_cache_that_a_failed_build_left_empty_may_be_deleted_for_another_reference(tmp_path: Path) -> None:
    begun = make_cache(tmp_path / "cache")
    other = CacheDescription(identity=make_identity(weight_dtype="bfloat16"), recorded={}, vocabulary_sha256="b" * 64)
    with pytest.raises(DpoCacheError, match="was begun for another reference") as empty:
        ReferenceCache.create(begun.path, other)
    assert f"delete the folder {begun.path}" in str(empty.value.next_step)
    fill_cache(begun, make_rows(10), shard_rows=5)
    with pytest.raises(DpoCacheError, match="holds the values of another reference") as filled:
        ReferenceCache.create(begun.path, other)
    assert "delete" not in str(filled.value.next_step)


def test_commands_that_refusals_suggest_can_be_pasted_whatever_the_path(tmp_path: Path) -> None:
    path = tmp_path / "my caches"
    with pytest.raises(DpoCacheError) as absent:
        ReferenceCache.open(path)
    assert f"--cache '{path}' --model" in str(absent.value.next_step)
    with pytest.raises(DpoCacheError) as nameless:
        make_cache(path).read_mixture("train")
    assert f"--cache '{path}' --mixture train" in str(nameless.value.next_step)


def test_making_a_cache_again_opens_it_and_changes_nothing(tmp_path: Path) -> None:
    first = make_cache(tmp_path / "cache")
    before = (first.path / "cache.json").read_bytes()
    again = ReferenceCache.create(
        first.path, CacheDescription(identity=make_identity(), recorded={"other": 1}, vocabulary_sha256="c" * 64)
    )
    assert (first.path / "cache.json").read_bytes() == before
    assert again.recorded == {"model": "made up"}


def test_another_reference_is_refused_with_every_field_that_differs(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    config = {"model_type": "llama", "rope_theta": 500000.0}
    with pytest.raises(DpoCacheError) as caught:
        make_cache(tmp_path / "cache", config=config, attention="eager", weights_sha256="0123456789abcdef" * 4)
    assert "attention: cached 'sdpa', asked for 'eager'" in caught.value.found
    assert "config.rope_theta: cached 10000.0, asked for 500000.0" in caught.value.found
    assert "weights_sha256: cached 'aaaaaaaaaaaa…', asked for '0123456789ab…'" in caught.value.found
    assert "weight_dtype" not in caught.value.found


def test_a_folder_of_something_else_is_not_made_a_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DpoCacheError, match=r"not a cache and not empty: it holds thesis\.tex"):
        make_cache(tmp_path)
    with pytest.raises(DpoCacheError, match="cannot be a cache"):
        make_cache(tmp_path / "thesis.tex")
    assert sorted(os.listdir(tmp_path)) == ["thesis.tex"]


def test_opening_a_folder_of_something_else_does_not_suggest_to_build_a_cache_in_it(tmp_path: Path) -> None:
    """A build refuses such a folder."""
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(DpoCacheError, match=r"it holds pairs\.jsonl, and no cache\.json") as caught:
        ReferenceCache.open(tmp_path)
    assert caught.value.next_step is None
    with pytest.raises(DpoCacheError, match="cannot be a cache"):
        ReferenceCache.open(tmp_path / "pairs.jsonl")


def test_opening_what_is_no_cache_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DpoCacheError, match=r"cache\.json is missing") as caught:
        ReferenceCache.open(tmp_path / "none")
    assert "dpo-cache build" in str(caught.value)


def test_every_flipped_bit_of_cache_json_is_found(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache").path / "cache.json"
    whole = path.read_bytes()
    for place in range(0, len(whole) * 8, 13):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DpoCacheError, match="is damaged"):
            ReferenceCache.open(tmp_path / "cache")


def spoil_seal(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'{"sha256":"', b'{"sha256":"0', 1))


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b""), spoil_seal])
def test_a_lost_or_damaged_cache_json_is_written_anew_for_the_reference_of_its_shards_and_no_other(
    tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    cache = make_cache(tmp_path / "cache")
    cache.shards.write(make_rows(3))
    path = cache.path / "cache.json"
    lose(path)
    is_there = path.exists()
    with pytest.raises(DpoCacheError, match="is damaged" if is_there else "is missing") as caught:
        ReferenceCache.open(cache.path)
    assert "run the dpo-cache build that made it once more" in str(caught.value)

    eager = CacheDescription(identity=make_identity(attention="eager"), recorded={}, vocabulary_sha256="b" * 64)
    for take_over in (ReferenceCache.create, ReferenceCache.planned):
        with pytest.raises(DpoCacheError, match=f"its shards hold values of the reference {cache.reference_id[:16]}"):
            take_over(cache.path, eager)
    if lose is spoil_seal:  # what it says can still be read, and the shards bear it out
        with pytest.raises(DpoCacheError, match=r"\(attention: cached 'sdpa', asked for 'eager'\)"):
            ReferenceCache.create(cache.path, eager)
    planned = ReferenceCache.planned(cache.path, cache.description)
    assert planned is not None
    assert len(planned.shards.key_index()) == 3
    assert path.exists() == is_there
    assert len(make_cache(cache.path).shards.key_index()) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "has format version 2"),
        ("format_version", "1", "has format version 1"),
        ("reference_id", "0" * 64, "is not the digest of 'identity'"),
        ("identity", [], "'identity'"),
        ("recorded", None, "'recorded'"),
        ("vocabulary_sha256", 1, "'vocabulary_sha256'"),
    ],
)
def test_a_cache_json_that_lies_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = make_cache(tmp_path / "cache").path / "cache.json"
    described = read_sealed_json(path, max_bytes=10**6)
    write_sealed_json(path, described | {field: value}, temporary_folder=tmp_path)
    with pytest.raises(DpoCacheError, match=message):
        ReferenceCache.open(tmp_path / "cache")


@pytest.mark.parametrize("name", ["shards", "mixtures", "tmp"])
def test_a_link_in_the_place_of_a_subfolder_is_refused(tmp_path: Path, name: str) -> None:
    """Else a cache from a stranger could make us write, or clean up, somewhere else."""
    cache = make_cache(tmp_path / "cache")
    outside = tmp_path / "outside"
    (cache.path / name).rename(outside)
    (cache.path / name).symlink_to(outside)
    with pytest.raises(DpoCacheError, match="is a symbolic link"):
        ReferenceCache.open(cache.path)
    with pytest.raises(DpoCacheError, match="is a symbolic link"):
        make_cache(cache.path)


def test_what_is_fetched_is_not_written_through_a_link(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    outside = tmp_path / "outside"
    outside.mkdir()
    (cache.path / "tmp/fetch").symlink_to(outside)
    with pytest.raises(DpoCacheError, match="tmp/fetch cannot be cleared"), cache.fetching():
        pytest.fail("files would be fetched to where the link leads")
    assert not list(outside.iterdir())


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "cache")
    (cache.path / "tmp/cache.lock").unlink(missing_ok=True)
    os.mkfifo(cache.path / "tmp/cache.lock")
    opened = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        """As for a user who may not write to it."""
        if path.suffix == ".lock":
            if flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            assert flags & os.O_NONBLOCK, "opening a pipe to read waits for somebody to write"
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    with cache.in_use_by("a test"):
        pass


def test_a_cache_is_read_without_writing_a_byte_or_taking_a_lock(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(10), shard_rows=5)
    before = {path: path.stat().st_mtime_ns for path in cache.path.rglob("*")}
    with cache.maintaining("a test"):
        opened = ReferenceCache.open(cache.path)
        check_mixture(opened, opened.read_mixture("train"))
        opened.shards.unusable()
    after = {path: path.stat().st_mtime_ns for path in cache.path.rglob("*") if path.suffix != ".lock"}
    assert {path: time_ns for path, time_ns in before.items() if path in after and path.name != "tmp"} == {
        path: time_ns for path, time_ns in after.items() if path.name != "tmp"
    }


def test_another_folder_of_the_same_reference_can_be_united_with_this_one(tmp_path: Path) -> None:
    ours, theirs = make_cache(tmp_path / "ours"), make_cache(tmp_path / "theirs")
    rows = make_rows(40)
    fill_cache(ours, rows[:25], shard_rows=10)
    fill_cache(theirs, rows[15:], shard_rows=10, name="held-out")
    for path in theirs.shards.paths():
        assert ours.shards.import_copy(path)
    ours.import_mixture(theirs.read_mixture("held-out"))
    files = {path: path.stat().st_ino for path in ours.path.rglob("*") if path.is_file()}
    assert not any(ours.shards.import_copy(path) for path in theirs.shards.paths())
    ours.import_mixture(theirs.read_mixture("held-out"))
    ours.shards.write(rows[:10])
    assert {path: path.stat().st_ino for path in files} == files, "a training may be reading what was written over"
    assert ours.mixture_names() == ["held-out", "train"]
    for name in ours.mixture_names():
        check_mixture(ours, ours.read_mixture(name))
    index = ours.shards.key_index()
    assert (len(index), index.num_duplicates) == (40, 10)


def test_a_retired_mixture_is_gone_and_the_others_are_named(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(5), shard_rows=5)
    fill_cache(cache, make_rows(5), shard_rows=5, name="other")
    cache.retire_mixture("train")
    with pytest.raises(DpoCacheError, match="no mixture 'train'") as caught:
        cache.read_mixture("train")
    assert caught.value.expected == "one of: other"


HOLD = """
import sys, time
from collections.abc import Callable
from pathlib import Path
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
cache = ReferenceCache.open(Path(sys.argv[1]))
held = {"gc": lambda: cache.maintaining("gc"), "training": cache.training}
with held.get(sys.argv[2], lambda: cache.building(sys.argv[2]))():
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_builders_of_different_mixtures_share_a_cache_and_of_the_same_do_not(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    process = hold(cache.path, "train")
    try:
        with cache.building("held-out"):
            pass
        with (
            pytest.raises(DpoCacheError, match=rf"in use by a build of mixture train \(process {process.pid} on"),
            cache.building("train"),
        ):
            pass
        with (
            pytest.raises(DpoCacheError, match=rf"gc cannot start: .* mixture train \(process {process.pid}"),
            cache.maintaining("gc"),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with cache.building("train"):  # whoever dies lets go
        pass


def test_a_lock_file_that_the_umask_of_another_user_made_read_only_locks_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "cache")
    with cache.building("train"):
        pass
    open_file = os.open

    def open_as_another_user(path: Path, flags: int, mode: int = 0o777) -> int:
        if path.suffix == ".lock" and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", open_as_another_user)
    with cache.building("train"), pytest.raises(DpoCacheError, match="is in use by"), cache.building("train"):
        pass
    with pytest.raises(DpoCacheError, match=r"mixture-new\.lock: Permission denied") as refused, cache.building("new"):
        pass
    assert f"chmod -R g+rwX {cache.path}" in (refused.value.next_step or "")


@pytest.mark.parametrize(("number", "is_of_rights"), [(errno.EBADF, True), (errno.EROFS, False), (errno.ENOSYS, False)])
def test_only_a_lack_of_rights_is_mended_by_rights(
    number: int, is_of_rights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS says EBADF to an exclusive lock on a file that is open to be read only."""
    cache = make_cache(tmp_path / "cache")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "open") if number == errno.EROFS else (fcntl, "flock")), fail)
    with pytest.raises(DpoCacheError, match=f"cannot lock .*: {os.strerror(number)}") as refused:
        cache.building("train").__enter__()
    assert ("chmod" in (refused.value.next_step or "")) is is_of_rights


def test_nobody_builds_while_files_are_removed(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    process = hold(cache.path, "gc")
    try:
        with pytest.raises(DpoCacheError, match=rf"in use by gc \(process {process.pid}"), cache.building("train"):
            pass
    finally:
        process.kill()
        process.wait()


def test_nobody_removes_files_while_a_training_reads_them_and_others_may_train_and_build(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    process = hold(cache.path, "training")
    try:
        with cache.training(), cache.building("train"):
            pass
        with (
            pytest.raises(DpoCacheError, match=r"compacting cannot start: .* in use by a training \(process \d+"),
            cache.maintaining("compacting"),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with (
        cache.maintaining("gc"),  # whoever dies lets go
        pytest.raises(DpoCacheError, match=rf"a training cannot start: .* in use by gc \(process {os.getpid()}"),
        cache.training(),
    ):
        pass


READ_ONLY = """
mount -t tmpfs none {folder} && cp -r {cache} {folder}/cache && {prepare} && mount -o remount,ro {folder} &&
{python} -c '
from collections.abc import Callable
from pathlib import Path
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
with ReferenceCache.open(Path("{folder}/cache")).training():
    print("trains")
'"""


@pytest.mark.parametrize("prepare", ["rm -r {folder}/cache/tmp", "rm {folder}/cache/tmp/*", "true"])
def test_a_training_needs_no_right_to_write(tmp_path: Path, prepare: str) -> None:
    cache, folder = make_cache(tmp_path / "cache"), tmp_path / "mounted"
    folder.mkdir()
    with cache.training():
        pass  # leaves lock files
    script = READ_ONLY.format(
        folder=folder, cache=cache.path, prepare=prepare.format(folder=folder), python=sys.executable
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no file systems can be mounted here")
    assert (done.stdout, done.returncode) == ("trains\n", 0), done.stderr


CREATE = """
import sys
from collections.abc import Callable
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cache_factory import make_cache, make_rows
cache = make_cache(Path(sys.argv[1]))
cache.shards.write(make_rows(20, seed=int(sys.argv[3])))
cache.shards.write(make_rows(20, seed=99))
"""


def test_builders_that_start_at_once_make_one_cache_and_lose_no_row(tmp_path: Path) -> None:
    helpers = str(Path(__file__).resolve().parents[1])
    processes = [
        subprocess.Popen([sys.executable, "-c", CREATE, str(tmp_path / "cache"), helpers, str(number)])
        for number in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    cache = ReferenceCache.open(tmp_path / "cache")
    assert cache.shards.unusable() == []
    assert len(cache.shards.paths()) == 5  # the shard all of them wrote is one file
    index = cache.shards.key_index()
    assert (len(index), index.num_duplicates) == (100, 0)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    cache = make_cache(tmp_path / "cache")
    (cache.path / "shards").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(DpoCacheError, match="Permission denied"):
        cache.shards.write(make_rows(1))


def test_what_a_cache_holds_is_told_from_pointers_alone(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    fill_cache(cache, make_rows(20), shard_rows=5)
    for path in [*cache.shards.paths(), *(cache.path / "mixtures").glob("*.parquet")]:
        path.unlink()
    mixture = ReferenceCache.open(cache.path).read_mixture("train")
    assert mixture.num_pairs == 20
    assert sum(shard.num_rows for shard in mixture.shards) == 20

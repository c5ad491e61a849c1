"""Weights are what their bytes are: not their path, not how they are cut into files."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache import digest_memo
from dpo_cache.pipeline.cache import weights_digest as weights_digest_module
from dpo_cache.pipeline.cache.canonical_json import canonical_bytes
from dpo_cache.pipeline.cache.digest_memo import DigestMemo, TensorDigest
from dpo_cache.pipeline.cache.weights_digest import weights_digest
from homeless_user import leave_without_home
from safetensors.torch import save_file

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def save_in_parts(folder: Path, parts: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts):
        save_file(tensors, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_file(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", *, claimed: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)


def test_the_digest_is_that_of_the_sorted_names_types_shapes_and_bytes(model: Path) -> None:
    entries = [
        [
            name,
            dtype,
            list(TENSORS[name].shape),
            hashlib.sha256(TENSORS[name].view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        if name != "scalar"
        else [name, dtype, [], hashlib.sha256(struct.pack("<q", 7)).hexdigest()]
        for name, dtype in (("a.weight", "BF16"), ("b.weight", "F32"), ("empty", "F32"), ("scalar", "I64"))
    ]
    assert weights_digest(model) == hashlib.sha256(canonical_bytes(entries)).hexdigest()


def test_the_same_weights_in_other_files_under_another_path_are_the_same(model: Path, tmp_path: Path) -> None:
    names = list(TENSORS)
    for number, cut in enumerate((1, 2, 3)):
        parts = [{name: TENSORS[name] for name in names[:cut]}, {name: TENSORS[name] for name in names[cut:]}]
        assert weights_digest(save_in_parts(tmp_path / f"other-{number}", parts)) == weights_digest(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["a.weight"].view(torch.int16)[0, 0].bitwise_xor_(1),
        lambda tensors: tensors.update({"a.weight": tensors["a.weight"].reshape(3, 2)}),
        lambda tensors: tensors.update({"b.weight": tensors["b.weight"].view(torch.int32)}),
        lambda tensors: tensors.update({"c.weight": tensors.pop("b.weight")}),
        lambda tensors: tensors.pop("scalar"),
        lambda tensors: tensors.update({"lm_head.weight": tensors["a.weight"].clone()}),
    ],
    ids=["one bit", "a shape", "a dtype", "a name", "a tensor less", "a tensor more"],
)
def test_any_change_of_the_weights_makes_another_digest(
    model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    change(tensors)
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    assert weights_digest(other) != weights_digest(model)


def test_unchanged_files_are_not_read_again_and_changed_ones_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    open_path = Path.open

    def recording(path: Path, *arguments: Any, **options: Any) -> Any:
        read.append(path)
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", recording)
    monkeypatch.setattr(digest_memo, "SETTLED_NS", -1)
    path = model / "model.safetensors"
    first = weights_digest(model)
    assert path in read
    read.clear()
    assert weights_digest(model) == first
    assert path not in read
    # Overwritten under the same name, with the same size and the same modification time.
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_digest(model) != first


def test_a_file_that_changed_a_moment_ago_is_not_remembered(model: Path) -> None:
    weights_digest(model)
    assert DigestMemo().get(model / "model.safetensors", (model / "model.safetensors").stat()) is None


def test_a_file_that_changes_while_it_is_read_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that is still being downloaded: its digest would be of no weights that ever were."""

    def hash_slowly(files: list[Path]) -> dict[Path, list[TensorDigest]]:
        hashed = hash_files(files)
        save_file({**TENSORS, "scalar": torch.tensor(8)}, model / "model.safetensors")
        return hashed

    hash_files = weights_digest_module._hash_files
    monkeypatch.setattr(weights_digest_module, "_hash_files", hash_slowly)
    with pytest.raises(DpoCacheError, match="changed while it was read"):
        weights_digest(model)


@pytest.mark.parametrize("changed", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev"])
def test_a_file_that_differs_in_anything_that_its_bytes_could_depend_on_is_not_recognised(
    model: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another disk is mounted in the same place, size, times and inode may all be equal."""
    monkeypatch.setattr(digest_memo, "SETTLED_NS", -1)
    weights_digest(model)
    path = model / "model.safetensors"
    seen = {name: getattr(path.stat(), name) for name in dir(path.stat()) if name.startswith("st_")}
    unchanged: Any = SimpleNamespace(**seen)
    other: Any = SimpleNamespace(**{**seen, changed: seen[changed] + 1})
    assert DigestMemo().get(path, unchanged) is not None
    assert DigestMemo().get(path, other) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 300])
def test_a_damaged_memo_counts_as_empty_and_is_replaced(
    model: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_memo, "SETTLED_NS", -1)
    first = weights_digest(model)
    DigestMemo().path.write_bytes(content)
    assert weights_digest(model) == first
    path = model / "model.safetensors"
    assert DigestMemo().get(path.resolve(), path.stat()) is not None


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/" + 300 * "n"], ids=["not made", "not even looked for"])
def test_a_memo_that_cannot_be_written_is_no_fault(model: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second as a folder in another user's private home, where only root may look for anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    monkeypatch.setattr(digest_memo, "SETTLED_NS", -1)
    assert len(weights_digest(model)) == 64


def test_a_user_without_a_home_has_no_memo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name."""
    leave_without_home(monkeypatch)
    monkeypatch.setattr(digest_memo, "SETTLED_NS", -1)
    assert len(weights_digest(model)) == 64


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DpoCacheError, match=r"only pytorch_model\.bin") as caught:
        weights_digest(tmp_path)
    assert "save_pretrained" in (caught.value.next_step or "")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 7, ["a"]])
def test_an_index_may_only_name_safetensors_files_of_its_folder(tmp_path: Path, name: object) -> None:
    save_file(TENSORS, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DpoCacheError, match="names the file"):
        weights_digest(folder)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = save_in_parts(tmp_path / "model", [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(DpoCacheError, match=r"part-1\.safetensors is missing"):
        weights_digest(folder)


def test_one_tensor_in_two_files_is_one_if_its_bytes_agree_and_a_fault_if_not(tmp_path: Path) -> None:
    both = [{"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.ones(1)}]
    same = save_in_parts(tmp_path / "same", both)
    index = {"weight_map": {"a": "part-0.safetensors", "b": "part-1.safetensors"}}
    (same / "model.safetensors.index.json").write_text(json.dumps(index))
    once = save_in_parts(tmp_path / "once", [both[1]])
    assert weights_digest(same) == weights_digest(once)
    save_file({"a": torch.ones(2)}, same / "part-0.safetensors")
    with pytest.raises(DpoCacheError, match="different bytes"):
        weights_digest(same)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        ({"a": ENTRY}, b"\0" * 7, None),
        ({"a": ENTRY}, b"\0" * 9, None),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16, None),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 8, None),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"\0" * 8, None),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"\0" * 8, None),
        ({"a": ENTRY | {"data_offsets": [0]}}, b"\0" * 8, None),
        ({"a": ENTRY | {"shape": [3]}}, b"\0" * 8, None),
        ({"a": ENTRY | {"shape": "2"}}, b"\0" * 8, None),
        ({"a": ENTRY | {"dtype": "F33"}}, b"\0" * 8, None),
        ({"a": ENTRY | {"dtype": ["F32"]}}, b"\0" * 8, None),
        ({"a": [1]}, b"\0" * 8, None),
        (b"not json", b"", None),
        (b'{"a":1,"a":2}', b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", 3),
    ],
)
def test_lying_headers_are_refused(
    tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, claimed: int | None
) -> None:
    write_file(tmp_path / "model.safetensors", header, data, claimed=claimed)
    with pytest.raises(DpoCacheError, match=r"model\.safetensors"):
        weights_digest(tmp_path)


def test_a_file_of_fewer_than_eight_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(DpoCacheError, match="not a whole safetensors file"):
        weights_digest(tmp_path)

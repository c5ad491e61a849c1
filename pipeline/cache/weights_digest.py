"""The digest of a model's weights: of every tensor's name, dtype, shape and bytes, as they lie on disk.

Never of a name, a path or a model in memory. Sorted by tensor, so that the same weights cut into other files
have the same digest; neither index nor metadata are part of it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from ...errors import DpoCacheError
from .canonical_json import canonical_bytes, parse_object, read_bounded
from .digest_memo import DigestMemo, TensorDigest, file_state

MODEL_FILE = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20
MAX_INDEX_BYTES = 256 << 20
CHUNK_BYTES = 8 << 20
MAX_THREADS = 8

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """One entry of a safetensors header; ``start`` and ``stop`` count from the beginning of the file."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    stop: int


def weights_digest(model_folder: Path) -> str:
    """SHA-256 in hex over the canonical JSON of the sorted [name, dtype, shape, SHA-256 of bytes] of all tensors.

    Files read before and unchanged since are not read again (:mod:`.digest_memo`).

    Raises:
        DpoCacheError: No safetensors weights, a damaged file, or one tensor with different bytes in two files.
    """
    return files_digest(weight_files(model_folder))


def weight_files(model_folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: the single file, else those the index names.

    Raises:
        DpoCacheError: There are none, or the index names a file outside the folder or one that is missing.
    """
    if (model_folder / MODEL_FILE).exists():
        return [model_folder / MODEL_FILE]
    index = model_folder / MODEL_INDEX
    if not index.exists():
        raise _no_safetensors(model_folder)
    weight_map = parse_object(read_bounded(index, max_bytes=MAX_INDEX_BYTES), source=index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DpoCacheError(f"{index} has no 'weight_map'")
    names = set(weight_map.values()) if all(isinstance(name, str) for name in weight_map.values()) else {""}
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise DpoCacheError(
                f"{index} names the file {str(name)[:200]!r}",
                expected="names of *.safetensors files of the same folder",
            )
    files = [model_folder / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise DpoCacheError(f"{file} is missing, but {index.name} names it", next_step="download it again")
    return files


def files_digest(files: Iterable[Path]) -> str:
    """The digest of all tensors of these safetensors files together.

    Raises:
        DpoCacheError: A file is damaged, changes meanwhile or cannot be read, or a tensor has other bytes in two files.
    """
    try:
        return _combined(_file_digests(files))
    except OSError as error:
        raise DpoCacheError(f"cannot read the weights: {error}") from error


def _file_digests(files: Iterable[Path]) -> dict[Path, list[TensorDigest]]:
    memo = DigestMemo()
    known: dict[Path, list[TensorDigest]] = {}
    unread: dict[Path, os.stat_result] = {}
    for file in sorted({file.resolve() for file in files}):
        status = file.stat()
        remembered = memo.get(file, status)
        if remembered is None:
            unread[file] = status
        else:
            known[file] = remembered
    hashed = _hash_files(list(unread))
    for file, status in unread.items():
        if file_state(file.stat()) != file_state(status):
            raise DpoCacheError(f"{file} changed while it was read", next_step="try again once it is complete")
    if hashed:
        memo.remember({file: (unread[file], tensors) for file, tensors in hashed.items()})
    return known | hashed


def _combined(digests: dict[Path, list[TensorDigest]]) -> str:
    seen: dict[str, tuple[TensorDigest, Path]] = {}
    for file, tensors in digests.items():
        for tensor in tensors:
            before, where = seen.setdefault(tensor[0], (tensor, file))
            if before != tensor:
                raise DpoCacheError(
                    f"the tensor {tensor[0][:200]!r} has different bytes in {where} and {file}",
                    next_step="remove the file that is not meant",
                )
    return hashlib.sha256(canonical_bytes([seen[name][0] for name in sorted(seen)])).hexdigest()


def _hash_files(files: list[Path]) -> dict[Path, list[TensorDigest]]:
    """Hash tensor by tensor on a few threads: SHA-256 lets go of the interpreter, and disks like company."""
    work = [(file, tensor) for file in files for tensor in _read_header(file)]
    with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        hashes = list(threads.map(lambda item: _hash_range(item[0], item[1].start, item[1].stop), work))
    digests: dict[Path, list[TensorDigest]] = {file: [] for file in files}
    for (file, tensor), sha256 in zip(work, hashes, strict=True):
        digests[file].append((tensor.name, tensor.dtype, tensor.shape, sha256))
    return digests


def _hash_range(file: Path, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(CHUNK_BYTES, stop - start)))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        left = stop - start
        while left:
            count = stream.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise DpoCacheError(f"{file} ends too early")
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _read_header(file: Path) -> list[_Tensor]:
    """Parse a safetensors header with the checks of its specification.

    The size comes first (8 bytes, little-endian), then JSON: for each tensor its dtype, shape and byte range
    after the header. The ranges must cover the rest of the file without holes or overlaps.
    """
    with file.open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        header_bytes = int.from_bytes(stream.read(8), "little")
        if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise _not_safetensors(file, "its header is larger than the file or than 100 MiB")
        header = parse_object(stream.read(header_bytes), source=file)
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + header_bytes) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    end = 8 + header_bytes
    for tensor in tensors:
        if tensor.start != end:
            raise _not_safetensors(file, f"the bytes of {tensor.name[:200]!r} overlap others or leave a hole")
        end = tensor.stop
    if end != file_bytes:
        raise _not_safetensors(file, f"it has {file_bytes} bytes, its header describes {end}")
    return tensors


def _tensor(file: Path, name: str, entry: object, data_start: int) -> _Tensor:
    if not isinstance(entry, dict):
        raise _not_safetensors(file, f"the entry of {name[:200]!r} is no object")
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _not_safetensors(file, f"the entry of {name[:200]!r} has an unknown dtype")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _not_safetensors(file, f"the entry of {name[:200]!r} has an impossible shape or range")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise _not_safetensors(file, f"the byte range of {name[:200]!r} does not fit its shape")
    return _Tensor(name=name, dtype=dtype, shape=shape, start=data_start + offsets[0], stop=data_start + offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 53 for item in value)


def _not_safetensors(file: Path, why: str) -> DpoCacheError:
    return DpoCacheError(f"{file} is not a whole safetensors file: {why}", next_step="download or save it again")


def _no_safetensors(folder: Path) -> DpoCacheError:
    if not folder.is_dir():
        return DpoCacheError(f"there is no model folder {folder}")
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    return DpoCacheError(
        f"{folder} has no {MODEL_FILE} or {MODEL_INDEX}" + (f", only {pickled[0]}" if pickled else ""),
        expected="weights as safetensors, which can be read without running code",
        next_step=(
            'convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        ),
    )

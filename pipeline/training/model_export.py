"""The trained model as other programs read it: ``model/`` with safetensors, config and tokenizer.

It is written beside its place and renamed once every header has been read back and compared, so a folder of that
name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import DpoCacheError
from ..cache.durable_file import make_folder_durably, settle_folder, settle_tree
from ..scoring.attention_choice import resolve_attention
from ..scoring.model_loading import find_causal_lm, is_noise_name, load_causal_lm
from ..scoring.quantization import quantized_layers
from .host_group import wait_for_all
from .lora_adapter import adapter_state, merge_adapter, same_adapter, write_adapter
from .model_tokenizer import ModelTokenizer
from .policy_engine import PolicyEngine
from .tensor_headers import check_headers, checkpoint_dtype, header_of
from .weight_files import write_weights

MAX_SHARD_SIZE = "5GB"


def export_model(
    engine: PolicyEngine,
    folder: Path,
    *,
    base_folder: Path,
    base_adapter: Path | None,
    tokenizer: ModelTokenizer,
    trust_remote_code: bool,
    card: str,
) -> None:
    """Write the policy, an adapter on it added to its weights; collective, and only rank 0 writes.

    Where the checkpoint is more precise than what was computed with, the optimizer's float32 weights are written:
    rounded to bfloat16, most updates of preference tuning would be gone. A trained adapter is then added to the
    checkpoint's own weights, which rank 0 reads again. The same happens where the policy's weights are quantized.

    Args:
        engine: The trained policy, partitioned or not.
        folder: The model's folder. One already there is replaced once the new one is whole.
        base_folder: The checkpoint that training started from. Weights are written in its dtype.
        base_adapter: The adapter that was added to that checkpoint before training; None where there was none.
        tokenizer: Written beside the weights.
        trust_remote_code: Run Python code that comes with the model.
        card: Text of a README.md.

    Raises:
        DpoCacheError: It could not be written, or a header is not what it should be.
    """
    model = engine.scorer.model
    dtype = checkpoint_dtype(base_folder)
    is_rounded = torch.finfo(dtype).eps < torch.finfo(engine.scorer.dtype).eps  # so is a float16 one in bfloat16
    has_adapter = find_causal_lm(model) is not model
    masters = engine.master_weight if is_rounded else None

    def write(temporary: Path) -> None:
        _write(model, temporary, dtype, base_folder, master_of=masters, wait=wait_for_all)
        tokenizer.write(temporary)

    def take_part() -> None:
        write_weights(model, None, dtype=dtype, max_file_size=MAX_SHARD_SIZE, master_of=masters, wait=wait_for_all)

    if not quantized_layers(model) and not (is_rounded and has_adapter):
        _write_on_main(engine, folder, write, card, take_part=take_part)
        return

    adapter = adapter_state(model, keep=engine.rank == 0)

    def write_merged(temporary: Path) -> None:
        base = load_causal_lm(
            base_folder,
            dtype=dtype,
            attention=resolve_attention(None, engine.scorer.config, torch.device("cpu")),
            device="cpu",
            adapter=base_adapter,
            trust_remote_code=trust_remote_code,
        )
        if base_adapter is not None:
            base = merge_adapter(base)
        whole = same_adapter(model, adapter, base)
        _write(whole, temporary, dtype, base_folder, wait=lambda: None)
        tokenizer.write(temporary)

    _write_on_main(engine, folder, write_merged, card)


def export_adapter(
    engine: PolicyEngine,
    folder: Path,
    *,
    base: str,
    revision: str | None,
    tokenizer: ModelTokenizer,
    card: str,
) -> None:
    """Write the adapter alone, with the tokenizer; collective, and only rank 0 writes.

    Args:
        engine: A policy with an adapter, partitioned or not.
        folder: As for :func:`export_model`.
        base: The checkpoint that training started from as a path or a Hub id, which those who load the adapter need.
        revision: Its commit on the Hub.
        tokenizer: Written beside the adapter.
        card: Text of a README.md.

    Raises:
        DpoCacheError: It could not be written, or a header is not what it should be.
    """
    model = engine.scorer.model
    state = adapter_state(model, keep=engine.rank == 0)

    def write(temporary: Path) -> None:
        write_adapter(model, state, temporary, base=base, revision=revision)
        tokenizer.write(temporary)
        check_headers(temporary, {name: header_of(tensor) for name, tensor in state.items()})

    _write_on_main(engine, folder, write, card)


def _write_on_main(
    engine: PolicyEngine,
    folder: Path,
    write: Callable[[Path], None],
    card: str,
    *,
    take_part: Callable[[], None] = lambda: None,
) -> None:
    """Rank 0 writes beside the folder and puts it in its place; the others take part in what it does, and wait."""
    if engine.rank == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder_durably(folder.parent)
        try:
            write(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            _follow_umask(temporary)
            _put_in_place(temporary, folder)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            shutil.rmtree(temporary, ignore_errors=True)  # half a model would only take up the room that is missing
            raise DpoCacheError(
                f"the model could not be written to {folder}: {error}",
                next_step="free some space (df -h) and run again with --resume: the last checkpoint is complete",
            ) from error
    else:
        take_part()
    wait_for_all()


def _write(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    base_folder: Path,
    *,
    master_of: Callable[[nn.Parameter], Tensor] | None = None,
    wait: Callable[[], None],
) -> None:
    # Without a tensor: config, settings of generation and code. The weights follow a file at a time.
    find_causal_lm(model).save_pretrained(folder, state_dict={})
    _restore_config(folder / "config.json", base_folder / "config.json", dtype)
    expected = write_weights(model, folder, dtype=dtype, max_file_size=MAX_SHARD_SIZE, master_of=master_of, wait=wait)
    check_headers(folder, expected)


def _follow_umask(folder: Path) -> None:
    """Give all within a folder the permissions of ``open`` and ``mkdir``; safetensors makes its files private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _restore_config(written: Path, base: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the files, not the one computed in, and undo what was changed for training only."""
    config, before = (json.loads(file.read_text(encoding="utf-8")) for file in (written, base))
    config = _with_settings_of(before, config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    written.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_settings_of(before: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config with the cache and noise settings of another, in its parts (``text_config``) too.

    transformers writes every setting out. One that the other leaves to its default must be left to it here as well.
    """
    kept = {name: value for name, value in config.items() if not _is_changed_for_training(name)}
    kept |= {name: value for name, value in before.items() if _is_changed_for_training(name)}
    parts = {name: value for name, value in kept.items() if isinstance(value, dict)}
    return kept | {name: _with_settings_of(_part(before, name), part) for name, part in parts.items()}


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _is_changed_for_training(name: str) -> bool:
    return name == "use_cache" or is_noise_name(name)


def _put_in_place(temporary: Path, folder: Path) -> None:
    settle_tree(temporary)  # a power cut must not leave the new name with old nothing behind it
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    settle_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)

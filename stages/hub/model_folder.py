"""From a path or a Hub id to a folder with the files of one commit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ...errors import DpoCacheError, first_line
from ...pipeline.data.named_path import named_path
from ...pipeline.data.tokenizer_files import TOKENIZER_FILES

MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
NOT_READ = ("*/*.safetensors", "consolidated*.safetensors")
"""Weights that repositories hold besides, and transformers does not read: the same ones in the maker's own format,
those of a training's checkpoints. They may be as large as the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """Where the files of a model lie, and what the user called it.

    Attributes:
        folder: A local folder.
        name: The path or Hub id as given.
        commit: The Hub commit the files belong to; None for a local folder.
        adapter: Those of an adapter that is to be added to the weights.
    """

    folder: Path
    name: str
    commit: str | None
    adapter: ModelFolder | None = None

    @property
    def adapter_folder(self) -> Path | None:
        """The adapter's local folder; None without one."""
        return self.adapter.folder if self.adapter else None


def find_model_folder(path_or_id: str, revision: str | None, *, files: Sequence[str] = MODEL_FILES) -> ModelFolder:
    """The local folder of a model, downloaded from the Hub where it is an id.

    Args:
        path_or_id: The folder or the id.
        revision: Branch, tag or commit on the Hub; None for the main branch.
        files: Which files are needed, as patterns of their names.

    Raises:
        DpoCacheError: No such folder, and no such model on the Hub or in its local copy; or the download broke off.
    """
    folder = named_path(path_or_id)
    if path_or_id and os.path.isdir(folder):  # a name may be longer than the system takes
        if revision is not None:
            raise DpoCacheError(
                f"the revision {revision} has no meaning for the folder {folder}",
                expected="a Hub id with a revision, or a folder without one",
            )
        return ModelFolder(folder=folder.resolve(), name=path_or_id, commit=None)
    if not path_or_id or os.path.exists(folder) or path_or_id.startswith(("/", "./", "../", "~")):
        raise DpoCacheError(
            f"{folder} is a file" if os.path.isfile(folder) else f"there is no folder {path_or_id!r}",
            expected="a folder with config.json and safetensors weights, or a Hub id",
        )
    try:
        snapshot = Path(
            snapshot_download(path_or_id, revision=revision, allow_patterns=list(files), ignore_patterns=list(NOT_READ))
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as missing:
        raise DpoCacheError(
            f"there is no folder {path_or_id!r}, and the Hub did not give a model of that name: {first_line(missing)}",
            expected="a folder with config.json and safetensors weights, or a Hub id",
            next_step="check the spelling and the network; for a gated model run `hf auth login` first",
        ) from missing
    except Exception as broken:  # a full disk, or a network that fails: the client's libraries have their own kinds
        raise DpoCacheError(
            f"the files of {path_or_id} could not be fetched from the Hub: {first_line(broken)}",
            next_step="run the same command again: it goes on from there",
        ) from broken
    return ModelFolder(folder=snapshot, name=path_or_id, commit=snapshot.name)

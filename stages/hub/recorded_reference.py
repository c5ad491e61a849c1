"""What a cache records of where its reference came from, and finding those files again."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DpoCacheError
from ...pipeline.cache.canonical_json import JsonObject
from ...pipeline.data.printable_text import one_line
from .model_folder import ModelFolder, find_model_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedReference:
    """Names that stand beside a reference's identity; a cache from elsewhere may lack any of them.

    Attributes:
        model: A Hub id or an absolute path.
        commit: The Hub commit of the model; None for a folder.
        adapter: A Hub id or an absolute path of a peft adapter on top of the model.
        adapter_commit: The Hub commit of the adapter; None for a folder.
    """

    model: str | None
    commit: str | None
    adapter: str | None = None
    adapter_commit: str | None = None

    @classmethod
    def of(cls, recorded: JsonObject) -> RecordedReference:
        """From :attr:`ReferenceCache.recorded`, whatever a stranger put there."""

        def text(name: str) -> str | None:
            value = recorded.get(name)
            return str(value) if value else None

        return cls(
            model=text("model"), commit=text("commit"), adapter=text("adapter"), adapter_commit=text("adapter_commit")
        )

    def to_json(self) -> JsonObject:
        """What a new cache records."""
        names: JsonObject = {"model": self.model, "commit": self.commit}
        if self.adapter is not None:
            names |= {"adapter": self.adapter, "adapter_commit": self.adapter_commit}
        return names

    @property
    def name(self) -> str:
        """What people may call the model."""
        return one_line(self.model or "unnamed model")

    def find_model(self) -> ModelFolder:
        """The model's files, downloaded from the Hub where need be.

        Raises:
            DpoCacheError: They are not to be found, or the cache does not say where they were.
        """
        return _find(self.model, self.commit, "model")

    def find_adapter(self) -> ModelFolder:
        """The adapter's files, as :meth:`find_model` does.

        Raises:
            DpoCacheError: They are not to be found, or the cache does not say where they were.
        """
        return _find(self.adapter, self.adapter_commit, "adapter")


def _find(name: str | None, commit: str | None, part: str) -> ModelFolder:
    if name is None:
        raise DpoCacheError(f"the cache does not record where the {part} of its reference was")
    return find_model_folder(name, commit)

"""What a cache records of its reference: read as it was written, and no name where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cache_factory import fill_cache, make_identity, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.pipeline.cache.cache_json import CacheDescription
from dpo_cache.pipeline.data.tokenizer import load_tokenizer
from dpo_cache.stages.hub.cache_card import cache_card
from dpo_cache.stages.hub.model_folder import ModelFolder
from dpo_cache.stages.hub.recorded_reference import RecordedReference
from dpo_cache.stages.info import cache_info
from dpo_cache.stages.training import model_card

HOSTILE_NAMES = ("~no-such-user/x", "x" * 5000, "half a pair \ud800", "a\0b", "evil\n\n# Heading\n  next: a command")


def test_the_record_is_read_as_it_was_written() -> None:
    plain = RecordedReference(model="owner/model", commit="1" * 40)
    adapted = RecordedReference(model="/models/base", commit=None, adapter="owner/lora", adapter_commit="2" * 40)
    assert RecordedReference.of(plain.to_json()) == plain
    assert RecordedReference.of(adapted.to_json()) == adapted
    assert plain.to_json() == {"model": "owner/model", "commit": "1" * 40}


def test_a_folder_is_found_again(tmp_path: Path) -> None:
    assert RecordedReference(model=str(tmp_path), commit=None).find_model().folder == tmp_path.resolve()


def test_a_cache_that_names_no_model_is_never_said_to_have_one_called_none() -> None:
    recorded = RecordedReference.of({})
    assert recorded.name == "unnamed model"
    with pytest.raises(DpoCacheError, match="does not record where the model of its reference was"):
        recorded.find_model()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_names_nothing_is_not_found_and_breaks_neither_a_line_nor_a_card(name: str, tmp_path: Path) -> None:
    """A card is written when a training has ended: what breaks it then, costs the training."""
    description = CacheDescription(identity=make_identity(), recorded={"model": name}, vocabulary_sha256="b" * 64)
    cache = ReferenceCache.create(tmp_path / "cache", description)
    mixture = fill_cache(cache, make_rows(4), shard_rows=4)
    with pytest.raises(DpoCacheError, match="there is no folder"):
        RecordedReference.of(cache.recorded).find_model()
    with pytest.raises(DpoCacheError):
        load_tokenizer(name, None, trust_remote_code=False)
    base = ModelFolder(folder=tmp_path, name=str(tmp_path), commit=None)
    run: Any = SimpleNamespace(pairs=SimpleNamespace(cache=cache, mixture=mixture), origin=SimpleNamespace(model=base))
    table = "\n".join(model_card._table(model_card._origin(run)))
    for text in (
        table,
        cache_card("lab/cache", cache, [mixture], branch=None, previous=None),
        cache_info(cache.path).text(),
    ):
        assert text.encode()
        assert "\n# Heading" not in text
        assert "\n  next: a command" not in text

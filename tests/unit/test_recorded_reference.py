"""What a cache records of its reference: read as it was written, and no name where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.hub.recorded_reference import RecordedReference


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

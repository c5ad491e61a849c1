"""What a run's folder says of how the run was begun."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dpo_cache.stages.training.run_config import has_run_config, recorded_fingerprint, write_run_config
from dpo_cache.stages.training.train_config import TrainConfig


@pytest.mark.parametrize("address", [None, "hf://datasets/a/b"])
def test_a_caches_folder_is_recorded_so_that_it_is_found_from_another_working_folder(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(cache=address or Path("cache"), output=Path("run"))
    recipe: Any = SimpleNamespace(to_json=dict)
    origin: Any = SimpleNamespace(model=SimpleNamespace(name="m"), is_reference=True)
    Path("run").mkdir()
    write_run_config(config, recipe, origin, fingerprint={"seed": 42})
    recorded = json.loads(Path("run/config.json").read_text())["settings"]
    assert recorded["cache"] == (address or str(tmp_path / "cache"))
    assert has_run_config(Path("run"))
    assert recorded_fingerprint(Path("run")) == {"seed": 42}

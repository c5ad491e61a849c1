"""A mixture is written once every shard that was scored is to be seen."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from cache_factory import make_cache, make_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.building import build_cache
from dpo_cache.stages.building.build_cache import wait_until_visible


def test_a_shard_that_a_shared_file_system_shows_late_is_waited_for(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    shard = cache.path / "shards" / cache.shards.write(make_rows(3)).file_name
    hidden = shard.rename(tmp_path / "hidden")
    threading.Timer(0.3, lambda: hidden.rename(shard)).start()
    wait_until_visible(cache, [shard.name])
    assert shard.exists()


def test_one_that_never_shows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "VISIBLE_WITHIN_S", 0.0)
    with pytest.raises(DpoCacheError, match=r"1 shards .* are not to be seen in .*: lost\.parquet"):
        wait_until_visible(make_cache(tmp_path / "cache"), ["lost.parquet"])

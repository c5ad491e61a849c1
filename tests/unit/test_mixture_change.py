"""What a build makes of a mixture of its name that is damaged or whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_factory import fill_cache, make_cache, make_rows, mixture_rows
from dpo_cache.errors import DpoCacheError
from dpo_cache.pipeline.cache.cache_folder import ReferenceCache
from dpo_cache.stages.build_config import BuildConfig
from dpo_cache.stages.mixture_change import MixtureContent, mixture_content
from dpo_cache.stages.pair_collection import CollectedPairs

ROWS = make_rows(12)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    made = make_cache(tmp_path / "cache")
    fill_cache(made, ROWS, shard_rows=4)
    return made


def content_of(cache: ReferenceCache, warnings: list[str], *, extend: bool = False) -> MixtureContent:
    """The same twelve pairs, asked for again."""
    config = BuildConfig(model="m", dataset=("d",), cache=cache.path, extend=extend)
    collected = CollectedPairs.__new__(CollectedPairs)
    for name, value in {"rows": mixture_rows(ROWS), "tokenization": {}, "sources": [{}], "dropped": {}}.items():
        object.__setattr__(collected, name, value)
    return mixture_content(cache, config, collected, warn=warnings.append)


@pytest.mark.parametrize("extend", [False, True])
def test_a_whole_mixture_of_the_same_pairs_is_left_alone(cache: ReferenceCache, extend: bool) -> None:
    warnings: list[str] = []
    assert not content_of(cache, warnings, extend=extend).is_new
    assert warnings == []


@pytest.mark.parametrize("extend", [False, True])
def test_one_that_names_a_shard_which_is_gone_is_written_again(cache: ReferenceCache, extend: bool) -> None:
    cache.shards.paths()[1].unlink()
    content = content_of(cache, [], extend=extend)
    assert content.is_new
    assert len(content.rows) == 12


@pytest.mark.parametrize("pattern", ["train.json", "*.parquet"])
def test_a_damaged_one_is_written_anew_with_a_warning_but_not_extended(cache: ReferenceCache, pattern: str) -> None:
    [path] = (cache.path / "mixtures").glob(pattern)
    path.write_bytes(path.read_bytes()[:-1])
    warnings: list[str] = []
    assert content_of(cache, warnings).is_new
    assert len(warnings) == 1
    assert "mixture train is written anew" in warnings[0]
    assert "is damaged" in warnings[0]
    with pytest.raises(DpoCacheError, match="is damaged"):
        content_of(cache, warnings, extend=True)

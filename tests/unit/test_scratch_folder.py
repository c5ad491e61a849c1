"""What a killed build leaves can be cleared away by whoever shares the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dpo_cache.stages.building.build_cache import scratch_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o775), (0o077, 0o700)])
def test_a_builds_scratch_folder_is_as_private_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with scratch_folder(tmp_path) as scratch:
            assert scratch.stat().st_mode & 0o777 == mode
        assert not scratch.exists()
    finally:
        os.umask(before)

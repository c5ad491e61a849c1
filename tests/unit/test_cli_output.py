"""What a program that asked for JSON gets when a command fails."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from dpo_cache.cli import dpo_cache


def test_a_fault_is_one_object_on_stdout_where_json_was_asked_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(dpo_cache, ["info", str(tmp_path), "--json"])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["found"] == f"there is no cache in {tmp_path}: cache.json is missing"
    assert error["next_step"].startswith("make one with: dpo-cache build")
    assert f"Error: {error['found']}" in result.stderr


def test_a_fault_leaves_stdout_empty_where_it_was_not(tmp_path: Path) -> None:
    assert CliRunner().invoke(dpo_cache, ["info", str(tmp_path)]).stdout == ""

"""Shells complete our commands: bash is run, the others' scripts are read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from dpo_cache.cli import dpo_cache
from dpo_cache.cli_completion import SHELLS, completion_script

SCRIPTS = ("dpo-cache", "dpo-train", "dpo-sweep", "dpo-report")
PRESS_TAB = """
PATH={bin}:$PATH
source {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/') {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def _completed(words: str, folder: Path) -> set[str]:
    """What bash offers for the last of the words."""
    script = folder / "completion.bash"
    script.write_text(completion_script("bash"))
    code = PRESS_TAB.format(
        bin=Path(sys.executable).parent, script=script, words=words, program=words.partition(" ")[0]
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, cwd=folder, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("shell", SHELLS)
def test_every_console_script_is_completed(shell: str) -> None:
    done = CliRunner().invoke(dpo_cache, ["completion", shell])
    assert done.exit_code == 0
    for script in SCRIPTS:
        assert f"_{script.replace('-', '_').upper()}_COMPLETE" in done.output, script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.output, text=True, timeout=60, check=True)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dpo-cache ver", {"verify"}),
        ("dpo-cache verify --re", {"--repair", "--rescore"}),
        ("dpo-train --lr-scheduler-type c", {"cosine", "constant"}),
        ("dpo-report --pn", {"--png"}),
        ("dpo-sweep --strat", {"--strategy"}),
    ],
)
def test_bash_offers_commands_options_and_choices(words: str, offered: set[str], tmp_path: Path) -> None:
    assert offered <= _completed(words, tmp_path)


def test_bash_offers_the_mixtures_of_the_cache_named_before(tmp_path: Path) -> None:
    (tmp_path / "my-cache" / "mixtures").mkdir(parents=True)
    for name in ("train", "held-out", "held-in"):
        (tmp_path / "my-cache" / "mixtures" / f"{name}.json").touch()
    assert _completed("dpo-train --cache my-cache --eval-mixture he", tmp_path) == {"held-in", "held-out"}
    assert _completed("dpo-cache show my-cache --mixture ''", tmp_path) == {"train", "held-in", "held-out"}
    assert _completed("dpo-train --mixture ''", tmp_path) == set(), "no cache yet, nothing to offer"

"""The documentation's site: it builds without a warning, fetches nothing, and has the commands as they are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation_blocks import ROOT

FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")


def test_the_page_of_commands_is_what_their_help_says() -> None:
    location = ROOT / "scripts" / "docs" / "command_reference.py"
    specification = importlib.util.spec_from_file_location("command_reference", location)
    assert specification is not None
    assert specification.loader is not None
    command_reference = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(command_reference)
    written = command_reference.PAGE.read_text(encoding="utf-8")
    assert written == command_reference.reference(), "run: python scripts/docs/command_reference.py"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md"))), "every page, and the one for dead links"
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not FETCHED.search(text), f"{page.name}: {FETCHED.search(text)}"
        code = re.sub(r"<pre.*?</pre>|<code>.*?</code>", "", text, flags=re.DOTALL)
        assert "```" not in code, f"{page.name}: a block that the site does not take for one"

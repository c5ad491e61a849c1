"""Where the benchmarks keep what they found: dated Markdown sections in ``results/``, a table and its circumstances."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
LOAD_BEFORE = os.getloadavg()[0]
"""Processes that wanted to run in the minute before this benchmark began."""


def keep_section(name: str, section: str) -> None:
    """Print a section and put it into ``results/<name>.md``: in place of the one of that heading, or at the end."""
    print(section)
    path = RESULTS / f"{name}.md"
    RESULTS.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(with_section(before, section), encoding="utf-8")


def keep_page(path: Path, *paragraphs: str) -> None:
    """Print a whole page of results and put it in place of the last one."""
    page = "\n\n".join(paragraphs) + "\n"
    print(page)
    path.parent.mkdir(exist_ok=True)
    path.write_text(page, encoding="utf-8")


def with_section(text: str, section: str) -> str:
    """``text`` with ``section`` in place of the one that has its heading, or else at the end."""
    parts = [part.rstrip("\n") for part in re.split(r"^(?=## )", text, flags=re.MULTILINE) if part.strip()]
    heading = section.partition("\n")[0]
    headings = [part.partition("\n")[0] for part in parts]
    place = headings.index(heading) if heading in headings else len(parts)
    parts[place : place + 1] = [section.rstrip("\n")]
    return "\n\n".join(parts) + "\n"


def dated_section(title: str, *paragraphs: str) -> str:
    """A Markdown section whose heading says what was measured, and today's date."""
    return "\n\n".join([f"## {title}, {today()}", *paragraphs]) + "\n"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> str:
    """A table; the first ``num_texts`` columns and one without a title to the left, figures to the right."""
    rules = ["---" if column < num_texts or not title else "---:" for column, title in enumerate(titles)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rules, *rows))


def today() -> str:
    """The date, in UTC."""
    return f"{datetime.now(UTC):%Y-%m-%d}"


def machine(*packages: str) -> str:
    """Date, hardware, versions and load average, as the line under a table has them."""
    versions = "".join(f", {name} {version(name)}" for name in packages)
    return (
        f"{today()}, {processor_name()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}{versions}; load average before the run: {LOAD_BEFORE:.1f}"
    )


def threads_of_machine(threads: int) -> str:
    """How many threads of what, with which torch, as a sentence in front of a table has it."""
    return f"{threads} threads of {processor_name()}; torch {version('torch')}"


def processor_name() -> str:
    """As the kernel calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

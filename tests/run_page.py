"""Run the blocks of a page in order, as a reader would who types them: ``python run_page.py BLOCKS.json``.

Python blocks share their names, as in one session; every bash block is a shell of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path("my-cache")


def run_sql(query: str) -> None:
    """Run a query over ``CACHE`` and the table of its mixture ``train``; it has to give rows."""
    import duckdb

    pointer = json.loads((CACHE / "mixtures" / "train.json").read_text(encoding="utf-8"))
    query = query.replace("CACHE", str(CACHE)).replace("<sha256>", pointer["table"]["sha256"])
    rows = duckdb.execute(query).fetchall()
    assert len(rows) == pointer["num_pairs"], f"{len(rows)} rows for {pointer['num_pairs']} pairs"


def run_block(block: dict[str, Any], names: dict[str, Any]) -> None:
    """Do what the block says."""
    if block["file"] is not None:
        Path(block["file"]).write_text(block["text"], encoding="utf-8")
    elif block["language"] == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block["text"]], check=True)
    elif block["language"] == "python":
        # As many lines before it as in the page, so that a traceback names the page's own.
        exec(compile("\n" * (block["line"] - 1) + block["text"], block["page"], "exec"), names)
    else:
        run_sql(block["text"])


def main(blocks: list[dict[str, Any]]) -> None:
    """Run them all; the first that fails ends it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        began = time.monotonic()
        print(f"== {block['page']}:{block['line']}", file=sys.stderr, flush=True)
        run_block(block, names)
        print(f"== took {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

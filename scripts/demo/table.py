"""The demo's closing table, from what the commands reported.

python scripts/demo/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = [
    ("pairs scored by the reference", "pairs_scored", "{:d}"),
    ("pairs reused from the cache", "pairs_reused", "{:d}"),
    ("forward passes of the reference", "reference_forwards", "{:d}"),
    ("loss at step 0 (ln 2 = 0.6931)", "step0_loss", "{:.4f}"),
    ("held-out accuracy before", "accuracy_before", "{:.1%}"),
    ("held-out accuracy after", "accuracy_after", "{:.1%}"),
    ("held-out reward margin after", "margin_after", "{:.2f}"),
    ("training time", "seconds", "{:.0f} s"),
]


def read(folder: Path, name: str) -> dict[str, Any]:
    """One command's report."""
    report: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return report


def column(builds: list[dict[str, Any]], run: dict[str, Any]) -> dict[str, Any]:
    """What one run cost, the builds before it included."""
    return {
        "pairs_scored": sum(build["pairs_scored"] for build in builds),
        "pairs_reused": sum(build["pairs_reused"] for build in builds),
        "reference_forwards": sum(build["reference_forwards"] for build in builds),
        "step0_loss": run["step0"]["loss"],
        "accuracy_before": run["eval_before"]["eval/rewards/accuracy"],
        "accuracy_after": run["eval_after"]["eval/rewards/accuracy"],
        "margin_after": run["eval_after"]["eval/rewards/margin"],
        "seconds": run["seconds"],
    }


def main(folder: Path) -> None:
    """Print the table."""
    first = column([read(folder, "build-first"), read(folder, "build-held-out")], read(folder, "beta-2"))
    second = column([read(folder, "build-second")], read(folder, "beta-10"))
    print(f"\n{'':34}{'run 1, beta 2':>16}{'run 2, beta 10':>16}")
    for title, key, form in ROWS:
        print(f"{title:34}{form.format(first[key]):>16}{form.format(second[key]):>16}")
    print(f"\nThe cache: dpo-cache info {folder}/cache      The models: {folder}/beta-2/model, {folder}/beta-10/model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What a pair costs in builds of more and more pairs, by one scoring process and by two.

    python benchmarks/build_curve.py            1,000 and 10,000 pairs
    python benchmarks/build_curve.py --large    100,000 too

Real builds with a very small model on a CPU, one thread a process. Scoring is counted in each scoring process from
its first batch to its last; the memory is the most that the leading process and any scoring process held. The pairs
lie in Parquet, as published datasets do: JSON lines are parsed ten megabytes at a time, which costs the leading process
some 90 MiB once a file is that long. A table is appended to ``benchmarks/results/curve.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.json
import pyarrow.parquet

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import synthetic_cache  # noqa: E402
from command_line import benchmark_parser  # noqa: E402
from result_table import dated_section, keep_section, machine, markdown_table  # noqa: E402
from tiny_model import tiny_tokenizer, write_tiny_model  # noqa: E402

TITLES = (
    *("pairs", "scoring processes", "whole build, s", "scoring, ms per pair", "of it in forward passes"),
    *("leader, MiB", "scorer, MiB"),
)
DATASET = "pairs.parquet"
ROW_GROUP_ROWS = 1_000
"""As the datasets library writes them."""
SAMPLE_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One build."""

    num_pairs: int
    num_workers: int
    report: dict[str, Any]
    leader_mib: float
    worker_mib: float

    def row(self) -> list[str]:
        scoring_s = self.report["forward_seconds"] / self.report["forward_share"]
        return [
            f"{self.num_pairs:,}",
            f"{self.num_workers}",
            f"{self.report['seconds']:.0f}",
            f"{1e3 * scoring_s / self.num_pairs:.2f}",
            f"{self.report['forward_share']:.1%}",
            f"{self.leader_mib:,.0f}",
            f"{self.worker_mib:,.0f}",
        ]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--large", action="store_true", help="builds of 100,000 pairs too")
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.sizes or [1_000, 10_000, *([100_000] if options.large else [])]
    rows = []
    with tempfile.TemporaryDirectory(prefix="dpo-cache-curve-") as scratch:
        folder = Path(scratch)
        write_tiny_model(folder / "model", tokenizer=tiny_tokenizer(), hidden_size=128, intermediate_size=512)
        for num_pairs in sizes:
            write_dataset(folder, num_pairs)
            for num_workers in (1, 2):
                rows.append(measured_build(folder, num_pairs, num_workers).row())
                print(*rows[-1], sep=" | ", file=sys.stderr)
    keep_section(
        "curve",
        dated_section(
            f"Up to {max(sizes):,} pairs",
            markdown_table(TITLES, rows, num_texts=0),
            f"{machine()}. Repeat with `python benchmarks/build_curve.py --large`.",
        ),
    )


def write_dataset(folder: Path, num_pairs: int) -> None:
    synthetic_cache.write_pairs(folder, num_pairs)
    rows = pyarrow.json.read_json(folder / synthetic_cache.PAIRS)
    pyarrow.parquet.write_table(rows, folder / DATASET, row_group_size=ROW_GROUP_ROWS)


def measured_build(folder: Path, num_pairs: int, num_workers: int) -> Point:
    cache = folder / f"cache-{num_pairs}-{num_workers}"
    command = [
        *(sys.executable, "-m", "dpo_cache", "build", "--json", "--model", str(folder / "model")),
        *("--dataset", str(folder / DATASET), "--cache", str(cache), "--num-workers", str(num_workers)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as build:
        leader, most = psutil.Process(build.pid), {"leader": 0.0, "worker": 0.0}
        while build.poll() is None:
            with suppress(psutil.Error, OSError):  # one that has just ended
                most["leader"] = max(most["leader"], peak_mib(leader.pid))
                for child in leader.children():
                    if "score" in child.cmdline():
                        most["worker"] = max(most["worker"], peak_mib(child.pid))
            time.sleep(SAMPLE_S)
        assert build.stdout is not None
        assert build.returncode == 0
        report: dict[str, Any] = json.loads(build.stdout.read())
    assert report["pairs_scored"] == num_pairs
    return Point(
        num_pairs=num_pairs,
        num_workers=num_workers,
        report=report,
        leader_mib=most["leader"],
        worker_mib=most["worker"],
    )


def peak_mib(pid: int) -> float:
    """The most memory that a process has held so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()

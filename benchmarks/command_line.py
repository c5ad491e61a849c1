"""The options that several benchmarks have."""

from __future__ import annotations

import argparse
import os


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's own docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_pairs(parser: argparse.ArgumentParser) -> None:
    """``--pairs``, a file of real data."""
    parser.add_argument("--pairs", required=True, help="preference pairs: a .jsonl, .jsonl.gz or .parquet file")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``, all cores by default."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))


def add_trl(parser: argparse.ArgumentParser) -> None:
    """``--trl-python``, the other side's interpreter."""
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL and torch")

"""What ``--dataset`` asks for: a dataset, a split of it, and how many of its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError

MOST_ROWS = 2_000_000_000
"""An amount that comes to more is a slip of the keyboard; its row numbers alone would not fit into memory."""
_OPTIONS = ("split", "config", "revision", "amount")
_SPEC = "PATH_OR_ID[,split=…][,config=…][,revision=…][,amount=…]"


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """Which rows of which dataset are asked for.

    Attributes:
        path: A ``.jsonl``, ``.json`` or ``.parquet`` file (also ``.gz``, ``.zst``), a folder of those, or a Hub id.
        split: Split, slices such as ``train[:10%]`` included; None for ``train``, or for the only one there is.
        config: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        amount: A share of the rows where it has a dot, a count where it has none; more than there are repeats rows.
    """

    path: str
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    amount: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise DpoCacheError(f"--dataset {self} names no dataset", expected=_SPEC)
        if self.amount is not None and not re.fullmatch(r"\d+\.?\d*|\.\d+", self.amount):
            raise DpoCacheError(
                f"--dataset {self}: {self.amount} is no amount",
                expected="a share with a dot (0.5, 2.0) or a count without (1000)",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PATH_OR_ID[,split=…][,config=…][,revision=…][,amount=…]``.

        Raises:
            DpoCacheError: A key is unknown or repeated, the amount is no number, or the path is missing.
        """
        path, *parts = text.split(",")
        options: dict[str, str] = {}
        for part in parts:
            key, _, value = part.partition("=")
            if key not in _OPTIONS or key in options or not value:
                has_comma = Path(f"{path},{part}").exists()
                raise DpoCacheError(
                    f"--dataset {text}: {part!r} is not understood",
                    expected=_SPEC,
                    next_step="a path with a comma cannot be given: rename it, or make a link to it"
                    if has_comma
                    else None,
                )
            options[key] = value
        return cls(path=path, **options)

    def __str__(self) -> str:
        options = [f",{key}={getattr(self, key)}" for key in _OPTIONS if getattr(self, key) is not None]
        return self.path + "".join(options)

    def num_picked(self, num_rows: int) -> int:
        """How many rows the amount means, of a dataset with this many."""
        if self.amount is None:
            return num_rows
        return int(float(self.amount) * num_rows) if "." in self.amount else int(self.amount)

    def pick_rows(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The row numbers that the amount picks from a dataset with this many rows, shape (rows picked,).

        Whole repeats in order, then the remainder drawn without replacement by a fixed seed, as open-instruct does.
        Fewer rows than there are is a remainder alone, hence a draw, not the first rows.

        Raises:
            DpoCacheError: The amount picks none, or more than :data:`MOST_ROWS`.
        """
        num_picked = self.num_picked(num_rows)
        if num_picked == 0:
            raise DpoCacheError(f"--dataset {self}: an amount of {self.amount} picks none of {num_rows} rows")
        if num_picked > MOST_ROWS:
            raise DpoCacheError(f"--dataset {self}: an amount of {self.amount} picks {num_picked} rows of {num_rows}")
        repeats, remainder = divmod(num_picked, num_rows)
        whole = np.tile(np.arange(num_rows, dtype=np.int64), repeats)
        drawn = np.random.RandomState(42).choice(num_rows, size=remainder, replace=False)
        return np.concatenate([whole, drawn.astype(np.int64)])

"""A row group of a shard, decoded and checked: what is read from the disk at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..data.token_pair import TokenPair
from .example_key import key_at
from .parquet_file import KEY_COLUMN, keys_of, numbers_of, one_array
from .scored_pair import VALUE_COLUMNS, ScoredPair, unusable_in_words, unusable_values

SUM_TOLERANCE = 1e-6
"""How far values per token may be from adding up to the sum beside them: in nats, or as a share of a larger sum. Both
come of the same numbers; only the order in which they were added may differ."""


class RowGroup:
    """Decoded rows of a shard as numpy arrays; a pair is taken out as views, without a copy."""

    def __init__(self, table: pa.Table, *, first_row: int, has_token_logps: bool) -> None:
        self.first_row = first_row
        self.num_bytes: int = table.nbytes
        columns = {name: one_array(table.column(name)) for name in table.column_names}
        self.keys = keys_of(columns[KEY_COLUMN])
        self._prompt = _Lists(columns["prompt_ids"])
        self._chosen = _Lists(columns["chosen_ids"])
        self._rejected = _Lists(columns["rejected_ids"])
        self._mask = _Lists(columns["scored_mask"])
        self._chosen_token_logps = _Lists(columns["ref_chosen_token_logps"])
        self._rejected_token_logps = _Lists(columns["ref_rejected_token_logps"])
        self._values = {name: numbers_of(columns[name]) for name in VALUE_COLUMNS}
        self._chosen_tokens = numbers_of(columns["chosen_tokens"])
        self._rejected_tokens = numbers_of(columns["rejected_tokens"])
        self._check()
        for side, token_logps, tokens in (
            ("chosen", self._chosen_token_logps, self._chosen_tokens),
            ("rejected", self._rejected_token_logps, self._rejected_tokens),
        ):
            self._check_token_logps(side, token_logps, tokens, are_there=has_token_logps)

    def __len__(self) -> int:
        return len(self.keys)

    def scored_pair(self, index: int) -> ScoredPair:
        """Row ``first_row + index``; its key is as stored, not recomputed."""
        return ScoredPair(
            key=key_at(self.keys, index),
            pair=TokenPair(
                prompt_ids=self._prompt[index],
                chosen_ids=self._chosen[index],
                rejected_ids=self._rejected[index],
                scored_mask=self._mask.get(index),
            ),
            ref_chosen_logps=float(self._values["ref_chosen_logps"][index]),
            ref_rejected_logps=float(self._values["ref_rejected_logps"][index]),
            ref_chosen_common_logps=float(self._values["ref_chosen_common_logps"][index]),
            ref_rejected_common_logps=float(self._values["ref_rejected_common_logps"][index]),
            chosen_tokens=int(self._chosen_tokens[index]),
            rejected_tokens=int(self._rejected_tokens[index]),
            chosen_token_logps=self._chosen_token_logps.get(index),
            rejected_token_logps=self._rejected_token_logps.get(index),
        )

    def _check(self) -> None:
        for ids in (self._prompt, self._chosen, self._rejected):
            if ids.absent.any() or (ids.lengths < 1).any():
                raise ValueError("a prompt or answer has no tokens")
            if len(ids.values) and ids.values.min() < 0:
                raise ValueError("a token id is negative")
        if unusable_values(self._values).any():
            raise ValueError(unusable_in_words(self.keys, self._values))
        self._check_counts()

    def _check_token_logps(
        self, side: str, token_logps: _Lists, tokens: npt.NDArray[np.int32], *, are_there: bool
    ) -> None:
        """As many as scored tokens, none above zero, and adding up to the sums; or none at all."""
        if (token_logps.absent == are_there).any():
            raise ValueError("values per token are there for some rows, or against what the footer says")
        if not are_there:
            return
        if (token_logps.lengths != tokens).any():
            raise ValueError("there are not as many values per token as scored tokens")
        common = np.minimum(self._chosen_tokens, self._rejected_tokens)
        for name, counts in ((f"ref_{side}_logps", tokens), (f"ref_{side}_common_logps", common)):
            sums, stated = token_logps.sums_of_first(counts), self._values[name]
            agrees = np.abs(sums - stated) <= SUM_TOLERANCE * np.maximum(1.0, np.abs(stated))
            if not (agrees | np.isnan(stated)).all() or not (token_logps.values <= 0).all():
                raise ValueError(f"values per token do not add up to {name}")

    def _check_counts(self) -> None:
        """Scored counts equal what the masks say; a mask covers its pair and never the first token."""
        plain = self._mask.absent
        right = (self._chosen_tokens == self._chosen.lengths) & (self._rejected_tokens == self._rejected.lengths)
        for index in np.flatnonzero(~plain).tolist():
            mask = self._mask[index]
            pair = self.scored_pair(index).pair
            right[index] = (
                len(mask) == pair.shared_prefix_tokens
                and not mask[0]
                and pair.chosen_tokens == self._chosen_tokens[index]
                and pair.rejected_tokens == self._rejected_tokens[index]
            )
        right &= (self._chosen_tokens >= 1) & (self._rejected_tokens >= 1)
        if not right.all():
            raise ValueError(f"the scored counts of {key_at(self.keys, int(right.argmin())).hex()} contradict its mask")


class _Lists:
    """A list column: flat values, and where each row's part lies."""

    def __init__(self, column: pa.ListArray) -> None:
        offsets = column.offsets.to_numpy(zero_copy_only=True)
        values = column.values
        if values.null_count:
            raise ValueError("a list holds a missing value")
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(values):
            raise ValueError("a list column contradicts itself")
        self.values: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
        self._starts, self._stops = offsets[:-1], offsets[1:]
        self.lengths: npt.NDArray[np.int32] = self._stops - self._starts
        self.absent: npt.NDArray[np.bool_] = (
            column.is_null().to_numpy(zero_copy_only=False)
            if column.null_count
            else np.zeros(len(column), dtype=np.bool_)
        )

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.values[self._starts[index] : self._stops[index]]

    def sums_of_first(self, counts: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """The sum of the first so many entries of each list, which has as many."""
        totals = np.concatenate([[0.0], np.cumsum(self.values, dtype=np.float64)])
        sums: npt.NDArray[np.float64] = totals[self._starts + counts] - totals[self._starts]
        return sums

    def get(self, index: int) -> npt.NDArray[Any] | None:
        return None if self.absent[index] else self[index]

"""Training pairs of a mixture as columns, and the order in which a mixture holds them.

Shapes: P training pairs, repeats included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from .example_key import Keys


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixtureRows:
    """Training pairs as columns, in any order; a pair that is to appear k times stands k times.

    Attributes:
        example_keys: Shape (P,), ``S32``.
        prompt_hashes: :func:`~.example_key.prompt_hash_prefix` of each prompt, shape (P,).
        prompt_lengths: Token ids of each prompt, shape (P,).
        chosen_lengths: Token ids of each chosen answer, shape (P,).
        rejected_lengths: Token ids of each rejected answer, shape (P,).
        sources: Position of each pair's dataset in the mixture's list of sources, shape (P,).
        source_rows: Row number in that dataset, shape (P,).
    """

    example_keys: Keys
    prompt_hashes: npt.NDArray[np.uint64]
    prompt_lengths: npt.NDArray[np.int32]
    chosen_lengths: npt.NDArray[np.int32]
    rejected_lengths: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int32]
    source_rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.example_keys)

    def take(self, places: npt.NDArray[np.int64]) -> MixtureRows:
        """The pairs at these places, in that order."""
        return MixtureRows(**{column.name: getattr(self, column.name)[places] for column in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[MixtureRows]) -> MixtureRows:
        """All parts, one after another."""
        return MixtureRows(
            **{
                column.name: np.concatenate([getattr(part, column.name) for part in parts])
                for column in fields(MixtureRows)
            }
        )

    def num_ids(self) -> dict[str, int]:
        """Token ids of all pairs: ``prompt``, ``chosen``, ``rejected``."""
        return {
            "prompt": int(self.prompt_lengths.sum(dtype=np.int64)),
            "chosen": int(self.chosen_lengths.sum(dtype=np.int64)),
            "rejected": int(self.rejected_lengths.sum(dtype=np.int64)),
        }

    def in_mixture_order(self) -> tuple[MixtureRows, npt.NDArray[np.int32]]:
        """Rows in the order of a mixture, and their repeat numbers: 0 for the first of its key, then 1, …

        The order is (repeat number, prompt hash, key): whole passes over the distinct pairs, pairs of one prompt
        side by side, otherwise as good as random, and the same however the datasets were listed.
        """
        by_key = np.lexsort((self.source_rows, self.sources, self.example_keys))
        keys = self.example_keys[by_key]
        starts_run = np.ones(len(keys), dtype=np.bool_)
        starts_run[1:] = keys[1:] != keys[:-1]
        repeats = places_in_runs(starts_run).astype(np.int32)
        order = np.lexsort((self.prompt_hashes[by_key], repeats))  # stable: equal prompts stay in the order of keys
        return self.take(by_key[order]), repeats[order]


def places_in_runs(starts_run: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The place of each row within its run of equal rows: 0 where one starts, then 1, …"""
    starts = np.flatnonzero(starts_run)
    return np.arange(len(starts_run)) - np.repeat(starts, np.diff(np.append(starts, len(starts_run))))

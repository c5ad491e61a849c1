"""A mixture: the ordered training set one build was asked for, and which shard holds each of its pairs.

A pointer ``mixtures/<name>.json``, written last, names a table ``mixtures/<sha256>.parquet`` with one row per
training pair. Shapes: P training pairs, repeats included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from .canonical_json import JsonObject
from .mixture_rows import MixtureRows
from .mixture_table import MixtureTable
from .parquet_file import KEY_COLUMN
from .shard_file import ShardRef

MIXTURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mixture:
    """A mixture as its pointer describes it; the table is read on demand.

    Attributes:
        name: What ``--mixture`` calls it.
        digest: SHA-256 in hex of the training set itself: its keys in order. It does not depend on which shard
            holds a row, so a cache built by other workers, compacted or refilled has the same mixture.
        reference_id: Reference of the cache it belongs to.
        num_pairs: Training pairs, repeats included.
        num_distinct_pairs: Without repeats.
        num_ids: Token ids of all training pairs: ``prompt``, ``chosen``, ``rejected``.
        block_rows: Pairs of a block.
        tokenization: How the tokens were made.
        sources: The datasets, in the order ``source`` counts them.
        dropped: What was not used and why.
        shards: The shards that hold its rows, in the order ``shard`` counts them: by digest.
        has_token_logps: Whether all of its pairs have log-probabilities per token.
        table: The rows.
    """

    name: str
    digest: str
    reference_id: str
    num_pairs: int
    num_distinct_pairs: int
    num_ids: dict[str, int]
    block_rows: int
    tokenization: JsonObject
    sources: list[JsonObject]
    dropped: JsonObject
    shards: list[ShardRef]
    has_token_logps: bool
    table: MixtureTable

    @property
    def settings(self) -> JsonObject:
        """The settings that its tokens were made with; empty where a cache from elsewhere does not record them."""
        return self.tokenization.get("settings") or {}

    def shared_prefix_lengths(self) -> npt.NDArray[np.int32]:
        """Token ids of each pair with its prompt once, shape (P,)."""
        total = self.table.column("prompt_length").copy()
        total += self.table.column("chosen_length")
        total += self.table.column("rejected_length")
        return total

    def longest_sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Token ids of each pair's prompt and longer answer, shape (P,)."""
        longest: npt.NDArray[np.int32] = np.maximum(
            self.table.column("chosen_length"), self.table.column("rejected_length")
        )
        longest += self.table.column("prompt_length")
        return longest

    def rows(self) -> MixtureRows:
        """All training pairs as columns, as :func:`~.mixture_writer.write_mixture` takes them.

        Raises:
            DpoCacheError: The table is damaged, or a row of it is of a dataset that the pointer does not list.
        """
        sources = self.table.column("source")
        if not 0 <= sources.min() <= sources.max() < len(self.sources):
            raise DpoCacheError(f"{self.table.path} names a dataset that the pointer {self.name}.json does not list")
        return MixtureRows(
            example_keys=self.table.column(KEY_COLUMN),
            prompt_hashes=self.table.column("prompt_hash"),
            prompt_lengths=self.table.column("prompt_length"),
            chosen_lengths=self.table.column("chosen_length"),
            rejected_lengths=self.table.column("rejected_length"),
            sources=sources,
            source_rows=self.table.column("source_row"),
        )


def check_name(name: str) -> None:
    """Refuse a mixture name that could name anything but one file of the folder.

    Raises:
        DpoCacheError: It could.
    """
    if not MIXTURE_NAME.fullmatch(name):
        raise DpoCacheError(
            f"{name[:128]!r} cannot name a mixture",
            expected="up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )

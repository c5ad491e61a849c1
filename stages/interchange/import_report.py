"""What an import brought, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..building.row_counts import dropped_in_words, truncated_in_words
from ..console.next_command import training_commands
from .import_proof import SampleSpread


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What an import brought.

    Attributes:
        cache: The cache folder.
        mixture: The mixture's name.
        source: Where the values came from: trainer, file name, digest.
        training_pairs: Pairs of the mixture, repeats included.
        pairs_imported: Distinct pairs whose values were taken over.
        pairs_reused: Distinct pairs the cache held already.
        dropped: Rows that make no pair, by reason.
        truncated: Rows of which something was cut, by part.
        rescored: The comparison with the reference; None where it was turned off or nothing was imported.
    """

    cache: str
    mixture: str
    source: dict[str, Any]
    training_pairs: int
    pairs_imported: int
    pairs_reused: int
    dropped: dict[str, int]
    truncated: dict[str, int]
    rescored: SampleSpread | None

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """For an 80-column terminal."""
        lines = []
        if self.dropped:
            lines.append(f"skipped rows: {dropped_in_words(self.dropped)}")
        if self.truncated:
            lines.append(f"cut: {truncated_in_words(self.truncated)}")
        lines.append(
            f"imported {self.pairs_imported:,} pairs from {self.source['name']} ({self.source['from']}); "
            f"{self.pairs_reused:,} were in the cache"
        )
        if self.rescored is not None:
            lines.append(
                f"scored {self.rescored.pairs} of them again: {self.rescored.max_per_token:.2g} nats per token apart "
                f"at most (bound {self.rescored.bound_per_token:g})"
            )
        elif self.pairs_imported:
            lines.append("warning: no pair was scored again; these values are taken on trust")
        lines.append(f"mixture {self.mixture}: {self.training_pairs:,} training pairs")
        lines.append(training_commands(self.cache, [self.mixture]))
        return "\n".join(lines)

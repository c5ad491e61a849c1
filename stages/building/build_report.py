"""What a build did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..console.counted_noun import counted
from ..console.next_command import training_commands
from .row_counts import dropped_in_words, truncated_in_words


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """Counts of one build.

    Attributes:
        cache: The cache folder.
        mixture: The mixture's name.
        dry_run: Whether it only reported what it would do.
        training_pairs: Pairs of the mixture, repeats included.
        already_there: Of this build's rows, those that the mixture had before ``--extend``.
        pairs_repeated: Of the rows that ``--extend`` adds, those whose pair the mixture had from another row.
        distinct_pairs: Distinct pairs among this build's rows.
        pairs_reused: Distinct pairs the cache held already.
        pairs_scored: Distinct pairs scored now; to be scored, in a dry run.
        reference_forwards: Forward passes of the reference.
        tokens: Tokens that went through it, a shared prompt counted once.
        seconds: Wall time of the build.
        scoring_seconds: Wall time of the scoring processes, their start and loading the model included.
        forward_seconds: Time in forward passes, summed over the scoring processes.
        forward_share: The same as a share of the time between a process's first batch and its last.
        dropped: Skipped rows, by reason.
        truncated: Rows of which something was cut, by part: ``prompt``, or ``chosen``, ``rejected`` and ``either``.
        usable_rows: Distinct rows of the datasets that make pairs.
        warnings: What did not stop the build and should be known.
    """

    cache: Path
    mixture: str
    dry_run: bool
    training_pairs: int
    already_there: int
    pairs_repeated: int
    distinct_pairs: int
    pairs_reused: int
    pairs_scored: int
    reference_forwards: int
    tokens: int
    seconds: float
    scoring_seconds: float
    forward_seconds: float
    forward_share: float
    dropped: dict[str, int]
    truncated: dict[str, int]
    usable_rows: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {**asdict(self), "cache": str(self.cache), "warnings": list(self.warnings)}

    def summary(self) -> str:
        """The closing lines on a terminal."""
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.dropped:
            lines.append(f"skipped rows: {dropped_in_words(self.dropped)}")
        if self.truncated:
            lines.append(f"cut: {truncated_in_words(self.truncated, num_rows=self.usable_rows)}")
        if self.already_there:
            lines.append(f"{counted(self.already_there, 'row')} already in mixture {self.mixture}")
        if self.pairs_repeated:
            lines.append(
                f"warning: {self.pairs_repeated:,} of the added pairs were already in mixture {self.mixture}: an epoch "
                "trains on them once more; to train on each once, build with --replace from data that has each once"
            )
        if self.dry_run:
            lines.append(
                f"would score {counted(self.pairs_scored, 'pair')} and reuse {self.pairs_reused:,}; "
                "nothing was loaded or written"
            )
            return "\n".join(lines)
        if self.pairs_scored:
            lines.append(
                f"scored {counted(self.pairs_scored, 'pair')} ({counted(self.tokens, 'token')}) in "
                f"{counted(self.reference_forwards, 'forward pass')}, {self.scoring_seconds:.1f} s with start-up; "
                f"reused {counted(self.pairs_reused, 'pair')}"
            )
        else:
            lines.append(f"nothing to score: all {self.pairs_reused:,} pairs are in the cache; no weights were loaded")
        lines.append(
            f"mixture {self.mixture}: {counted(self.training_pairs, 'pair')}; the build took {self.seconds:.1f} s"
        )
        lines.append(training_commands(self.cache, [self.mixture]))
        return "\n".join(lines)

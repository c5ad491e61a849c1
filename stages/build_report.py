"""What a build did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .next_command import training_commands


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """Counts of one build.

    Attributes:
        cache: The cache folder.
        mixture: The mixture's name.
        dry_run: Whether it only said what it would do.
        training_pairs: Pairs of the mixture, repeats included.
        already_there: Of this build's rows, those that the mixture had before ``--extend``.
        distinct_pairs: Distinct pairs among this build's rows.
        pairs_reused: Distinct pairs the cache held already.
        pairs_scored: Distinct pairs scored now; to be scored, in a dry run.
        reference_forwards: Forward passes of the reference.
        tokens: Tokens that went through it, a shared prompt counted once.
        seconds: Wall time of the build.
        scoring_seconds: Wall time of the scoring processes.
        forward_seconds: What forward passes took, of all scoring processes together.
        forward_share: Share of the scoring processes' time that forward passes took, from first batch to last.
        dropped: Rows that make no pair, by reason.
        truncated: Rows with a side longer than the limit, by side.
        warnings: What did not stop the build.
    """

    cache: Path
    mixture: str
    dry_run: bool
    training_pairs: int
    already_there: int
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
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {**asdict(self), "cache": str(self.cache), "warnings": list(self.warnings)}

    def summary(self) -> str:
        """The closing lines on a terminal."""
        lines = [f"warning: {warning}" for warning in self.warnings]
        if self.dropped:
            dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            lines.append(f"rows that are not used: {dropped}")
        if self.already_there:
            lines.append(f"{self.already_there} rows were in mixture {self.mixture} already")
        if self.dry_run:
            lines.append(
                f"would score {self.pairs_scored} pairs and reuse {self.pairs_reused}; nothing was loaded or written"
            )
            return "\n".join(lines)
        if self.pairs_scored:
            rate = self.tokens / self.scoring_seconds if self.scoring_seconds else 0.0
            lines.append(
                f"scored {self.pairs_scored} pairs in {self.reference_forwards} forward passes "
                f"({rate:,.0f} tokens/s, {self.forward_share:.0%} of the time in them), reused {self.pairs_reused}"
            )
        else:
            lines.append(f"nothing to score: all {self.pairs_reused} pairs are in the cache; no weights were loaded")
        lines.append(f"mixture {self.mixture}: {self.training_pairs} training pairs ({self.seconds:.0f} s)")
        lines.append(training_commands(self.cache, [self.mixture]))
        return "\n".join(lines)

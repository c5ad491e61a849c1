"""How far a reference is from the values of a cache, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How far values are from the cached ones: ``|ours − cached| / scored tokens`` of a side, in nats.

    Attributes:
        way: How the pairs were batched.
        mean_per_token: Over all sides.
        max_per_token: Of the worst side.
        max_in_bounds: The largest share that a side's distance has of what training's step-0 proof allows it.
    """

    way: str
    mean_per_token: float
    max_per_token: float
    max_in_bounds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RescoreReport:
    """The noise floor of a cache.

    Attributes:
        pairs: Pairs scored again.
        dtype: Precision of the reference.
        bound_per_token: What training's step-0 proof allows a side that is not short.
        spreads: One for each way of batching.
        outliers: Keys of pairs beyond the bound, by the digest of the shard that holds them.
    """

    pairs: int
    dtype: str
    bound_per_token: float
    spreads: list[Spread]
    outliers: dict[str, list[bytes]]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        outliers = {shard: [key.hex() for key in keys] for shard, keys in self.outliers.items()}
        return {**asdict(self), "outliers": outliers}

    def text(self) -> str:
        """For an 80-column terminal."""
        width = 2 + max(len(spread.way) for spread in self.spreads)
        lines = [
            f"scored {self.pairs} pairs again in {self.dtype}: difference in nats per token",
            f"{'':{width}}{'mean':>10}{'max':>10}{'max / bound':>13}",
        ]
        for spread in self.spreads:
            lines.append(
                f"{'  ' + spread.way:{width}}{spread.mean_per_token:10.2e}{spread.max_per_token:10.2e}"
                f"{spread.max_in_bounds:13.4f}"
            )
        lines.append(f"  the bound is that of training's check at step 0, {self.bound_per_token:g}")
        return "\n".join(lines)

"""What of a cache is to be scored again. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import DpoCacheError


@dataclass(frozen=True, kw_only=True, slots=True)
class RescoreSettings:
    """What to score again.

    Attributes:
        pairs: Size of the random sample.
        model: Where the reference lies now; None for where it lay when the cache was made.
        seed: Of the sample.
        trust_remote_code: Whether the model's own Python code may run.
    """

    pairs: int
    model: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    @classmethod
    def asked_for(
        cls, pairs: int | None, *, model: str | None, seed: int | None, trust_remote_code: bool
    ) -> RescoreSettings | None:
        """From what a command line gave; None where nothing is to be scored again.

        Raises:
            DpoCacheError: Something is said about a sample that nobody asked for.
        """
        if pairs is not None:
            return cls(pairs=pairs, model=model, seed=seed or 0, trust_remote_code=trust_remote_code)
        given = {"--model": model is not None, "--seed": seed is not None, "--trust-remote-code": trust_remote_code}
        for option, is_given in given.items():
            if is_given:
                raise DpoCacheError(f"{option} has no effect without --rescore", next_step="add --rescore N")
        return None

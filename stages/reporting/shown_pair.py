"""One pair as a person reads it: decoded text, what of it was scored, and what the reference said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.scored_pair import ScoredPair
from ...pipeline.data.printable_text import printable
from ...pipeline.data.tokenizer import load_tokenizer, vocabulary_sha256

Decode = Callable[[Sequence[int]], str]
COLOURS = {"prompt": "yellow", "chosen": "green", "rejected": "red"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRun:
    """Neighbouring tokens that are all scored or all not."""

    text: str
    scored: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPair:
    """One pair, decoded.

    Attributes:
        row: The row as the cache holds it.
        parts: Runs of ``prompt``, ``chosen`` and ``rejected``.
    """

    row: ScoredPair
    parts: dict[str, list[ShownRun]]

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        row = self.row
        return {
            "key": row.key.hex(),
            **{name: "".join(run.text for run in runs) for name, runs in self.parts.items()},
            "scored": {name: [[run.text, run.scored] for run in runs] for name, runs in self.parts.items()},
            "prompt_ids": row.pair.prompt_ids.tolist(),
            "chosen_ids": row.pair.chosen_ids.tolist(),
            "rejected_ids": row.pair.rejected_ids.tolist(),
            "chosen_tokens": row.chosen_tokens,
            "rejected_tokens": row.rejected_tokens,
            "ref_chosen_logps": row.ref_chosen_logps,
            "ref_rejected_logps": row.ref_rejected_logps,
            "ref_chosen_token_logps": _listed(row.chosen_token_logps),
            "ref_rejected_token_logps": _listed(row.rejected_token_logps),
        }

    def facts(self) -> dict[str, str]:
        """Lengths, and what the reference said, of each part."""
        row = self.row
        return {
            "prompt": f"{len(row.pair.prompt_ids)} tokens",
            "chosen": _side(len(row.pair.chosen_ids), row.chosen_tokens, row.ref_chosen_logps),
            "rejected": _side(len(row.pair.rejected_ids), row.rejected_tokens, row.ref_rejected_logps),
        }

    def text(self) -> str:
        """For a terminal; colours mark what was scored."""
        lines = [click.style(f"key {self.row.key.hex()}", bold=True)]
        facts = self.facts()
        for name, runs in self.parts.items():
            lines.append(click.style(f"{name}  {facts[name]}", bold=True))
            lines.append("".join(_coloured(run, COLOURS[name]) for run in runs))
        return "\n".join(lines)


def named_decoder(name: str, *, vocabulary: str) -> Decode:
    """The decoding of a tokenizer that the user names.

    Args:
        name: Its folder or Hub id.
        vocabulary: SHA-256 of the vocabulary that made the tokens.

    Raises:
        DpoCacheError: It cannot be loaded, or has another vocabulary.
    """
    try:
        tokenizer = load_tokenizer(name, None, trust_remote_code=False)
    except DpoCacheError as fault:
        raise DpoCacheError(f"--tokenizer {name}: {fault.found}", expected=fault.expected) from fault
    if vocabulary_sha256(tokenizer) != vocabulary:
        raise DpoCacheError(
            f"--tokenizer {name} has another vocabulary than the tokenizer that made these tokens",
            expected="the same tokenizer, wherever it is now",
        )
    return _decoding(tokenizer)


def decoder_of(mixture: Mixture | None) -> tuple[Decode, str | None]:
    """The recorded tokenizer's decoding, or plain ids and the reason."""
    if mixture is None:
        return _ids_in_words, "no mixture says which tokenizer made these tokens: here are their ids"
    try:
        settings = mixture.tokenization["settings"]
        # Whatever the mixture says: a cache may come from anyone, and none of its words runs code.
        tokenizer = load_tokenizer(settings["tokenizer"], settings["tokenizer_revision"], trust_remote_code=False)
        if vocabulary_sha256(tokenizer) != mixture.tokenization["vocabulary_sha256"]:
            raise DpoCacheError("it has another vocabulary by now")
    except (DpoCacheError, KeyError, TypeError) as error:
        reason = error.found if isinstance(error, DpoCacheError) else "the mixture does not name one"
        return (
            _ids_in_words,
            f"the tokenizer that made these tokens could not be loaded ({reason}): here are their ids",
        )
    return _decoding(tokenizer), None


def shown_pair(row: ScoredPair, decode: Decode) -> ShownPair:
    """Decode one pair, scored and other tokens apart, without control characters."""
    pair = row.pair
    return ShownPair(
        row=row,
        parts={
            "prompt": list(_runs(pair.prompt_ids, pair.prompt_scored, decode)),
            "chosen": list(_runs(pair.chosen_ids, pair.chosen_scored, decode)),
            "rejected": list(_runs(pair.rejected_ids, pair.rejected_scored, decode)),
        },
    )


def _decoding(tokenizer: Any) -> Decode:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _runs(ids: npt.NDArray[np.int32], scored: npt.NDArray[np.bool_], decode: Decode) -> Iterator[ShownRun]:
    bounds = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
    for start, stop in pairwise(bounds):
        yield ShownRun(text=printable(decode(ids[start:stop].tolist())), scored=bool(scored[start]))


def _ids_in_words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) + " "


def _side(length: int, scored: int, logps: float) -> str:
    tokens = f"{length} tokens" if scored == length else f"{length} tokens ({scored} scored)"
    return f"{tokens}, reference {logps:.3f} nats, {logps / scored:.4f} a token"


def _listed(token_logps: npt.NDArray[np.float32] | None) -> list[float] | None:
    return None if token_logps is None else token_logps.tolist()


def _coloured(run: ShownRun, colour: str) -> str:
    return click.style(run.text, fg=colour) if run.scored else run.text

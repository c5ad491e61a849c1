"""Pairs of a cache as a person reads them: decoded text, what of it was scored, and what the reference said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..errors import DpoCacheError
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.example_key import key_at
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.pair_stream import PairStream
from ..pipeline.cache.scored_pair import ScoredPair
from ..pipeline.cache.shard_file import read_shard_rows
from ..pipeline.data.printable_text import printable
from ..pipeline.data.tokenizer import load_tokenizer, vocabulary_sha256
from .local_copy import glance, local_copy
from .location import Location

Decode = Callable[[Sequence[int]], str]
KEY_LETTERS = 64
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowReport:
    """Some pairs of a cache.

    Attributes:
        pairs: The pairs.
        note: Why ids stand in place of text; None where there is text.
    """

    pairs: list[ShownPair]
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {"pairs": [pair.to_json() for pair in self.pairs], "note": self.note}

    def text(self) -> str:
        """For a terminal; coloured text was scored."""
        return "\n\n".join([*([self.note] if self.note else []), *(pair.text() for pair in self.pairs)])


def show(location: Location, *, count: int, mixture_name: str | None, key: str | None) -> ShowReport:
    """Decode pairs with the tokenizer that made them, or show their ids where it is not to be had.

    Args:
        location: The cache. Of one at an address, no more shards are read than it takes.
        count: How many pairs, in the mixture's order.
        mixture_name: Of which mixture; None for ``train``, or the only one there is.
        key: A pair's key in hex, or how it begins, instead of the first pairs.

    Raises:
        DpoCacheError: There is no such cache, mixture or pair, or it is damaged.
    """
    names = [mixture_name] if mixture_name else None
    if key is not None:  # any shard could hold it
        return _show(local_copy(location, names), count=count, mixture_name=mixture_name, key=key)
    with glance(location, names, first_rows=count) as path:
        return _show(path, count=count, mixture_name=mixture_name, key=None)


def _show(path: Path, *, count: int, mixture_name: str | None, key: str | None) -> ShowReport:
    cache = ReferenceCache.open(path)
    mixture = _find_mixture(cache, mixture_name)
    if key is not None:
        rows = [_find_row(cache, key)]
    elif mixture is not None:
        stream = PairStream(cache, mixture)
        rows = stream.read(np.arange(min(count, mixture.num_pairs)))
        stream.close()
    else:
        raise DpoCacheError(
            f"{path} has no mixture yet: no build has finished", next_step="name a pair instead: --key HEX"
        )
    decode, note = decoder_of(mixture)
    return ShowReport(pairs=[shown_pair(row, decode) for row in rows], note=note)


def _find_mixture(cache: ReferenceCache, name: str | None) -> Mixture | None:
    names = cache.mixture_names()
    if name is None and not names:
        return None
    return cache.read_mixture(name or ("train" if "train" in names or len(names) > 1 else names[0]))


def _find_row(cache: ReferenceCache, key: str) -> ScoredPair:
    wanted = key.lower()
    if not wanted or len(wanted) > KEY_LETTERS or set(wanted) - set("0123456789abcdef"):
        raise DpoCacheError(f"--key {key[:100]} is no key", expected="up to 64 hexadecimal digits")
    index = cache.shards.key_index()
    first, last = (
        np.searchsorted(index.keys, np.bytes_(bytes.fromhex(wanted.ljust(KEY_LETTERS, fill)))) for fill in "0f"
    )
    found = [key_at(index.keys, place) for place in range(int(first), min(int(last) + 1, len(index)))]
    found = [candidate for candidate in found if candidate.hex().startswith(wanted)]
    if len(found) != 1:
        raise DpoCacheError(
            f"{len(found) or 'no'} pairs of {cache.path} have a key that begins with {wanted}", expected="one"
        )
    place = int(index.find(np.array(found, dtype=index.keys.dtype))[0])
    shard = index.shards[int(index.shard_numbers[place])]
    (row,) = read_shard_rows(cache.shards.path_of(shard), [int(index.rows[place])])
    return row


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
        return _ids_in_words, f"the tokenizer that made these tokens is not to be had ({reason}): here are their ids"
    return (lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), None


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

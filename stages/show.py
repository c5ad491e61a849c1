"""Pairs of a cache as a person reads them: decoded text, what of it was scored, and what the reference said."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DpoCacheError, as_argument
from ..pipeline.cache.cache_folder import ReferenceCache
from ..pipeline.cache.mixture import Mixture
from ..pipeline.cache.pair_lookup import KEY_LETTERS, PairLookup
from ..pipeline.cache.pair_stream import PairStream
from ..pipeline.cache.scored_pair import ScoredPair
from ..pipeline.data.printable_text import one_line
from .addresses.local_copy import glance, local_copy
from .addresses.location import Location
from .reporting.shown_pair import Decode, ShownPair, decoder_of, named_decoder, shown_pair

USUAL_COUNT = 3


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
        return "\n\n".join([*([one_line(self.note)] if self.note else []), *(pair.text() for pair in self.pairs)])


def show(
    location: Location,
    *,
    mixture_name: str | None,
    count: int | None = None,
    key: str | None = None,
    tokenizer: str | None = None,
) -> ShowReport:
    """Decode pairs with the tokenizer that made them, or show their ids where it cannot be loaded.

    Args:
        location: The cache. Of one at an address, no more shards are read than it takes.
        count: How many pairs, in the mixture's order; None for :data:`USUAL_COUNT`.
        mixture_name: Of which mixture; None for ``train``, or the only one there is.
        key: A pair's key in hex, or how it begins, instead of the first pairs.
        tokenizer: Folder or Hub id of the tokenizer; None for where the mixture says that it is.

    Raises:
        DpoCacheError: There is no such cache, mixture or pair, or it is damaged; or the tokenizer that is named is not
            the one that made the tokens; or both a count and a key are given.
    """
    if key is not None and count is not None:
        raise DpoCacheError("-n has no effect with --key, which names a single pair", next_step="leave out one of them")
    count = count or USUAL_COUNT
    names = [mixture_name] if mixture_name else None
    if key is not None:  # any shard could hold it
        return _show(local_copy(location, names), count=count, mixture_name=mixture_name, key=key, tokenizer=tokenizer)
    with glance(location, names, first_rows=count) as path:
        return _show(path, count=count, mixture_name=mixture_name, key=None, tokenizer=tokenizer)


def _show(path: Path, *, count: int, mixture_name: str | None, key: str | None, tokenizer: str | None) -> ShowReport:
    cache = ReferenceCache.open(path)
    mixture = _find_mixture(cache, mixture_name, any_will_do=key is not None)
    if key is not None:
        rows = [_find_row(cache, key)]
    elif mixture is not None:
        with closing(PairStream(cache, mixture)) as stream:
            rows = stream.read(np.arange(min(count, mixture.num_pairs)))
    else:
        raise DpoCacheError(
            f"{path} has no mixture yet: no build has finished", next_step="name a pair instead: --key HEX"
        )
    decode, note = _decoder(cache, mixture, tokenizer)
    return ShowReport(pairs=[shown_pair(row, decode) for row in rows], note=note)


def _decoder(cache: ReferenceCache, mixture: Mixture | None, tokenizer: str | None) -> tuple[Decode, str | None]:
    """The decoding, and a note where there is only that into ids."""
    if tokenizer is not None:
        made_by = mixture.tokenization if mixture is not None else {}
        vocabulary = str(made_by.get("vocabulary_sha256", cache.vocabulary_sha256))
        return named_decoder(tokenizer, vocabulary=vocabulary), None
    decode, why_ids = decoder_of(mixture)
    return decode, f"{why_ids}; --tokenizer names where it is now" if why_ids else None


def _find_mixture(cache: ReferenceCache, name: str | None, *, any_will_do: bool) -> Mixture | None:
    """The mixture to show, or, for a pair that a key names, one that says how tokens were made."""
    names = cache.mixture_names()
    if name is None and not names:
        return None
    if name is None and "train" not in names and (any_will_do or len(names) == 1):
        name = names[0]
    return cache.read_mixture(name or "train")


def _find_row(cache: ReferenceCache, key: str) -> ScoredPair:
    wanted = key.lower()
    if not wanted or len(wanted) > KEY_LETTERS or set(wanted) - set("0123456789abcdef"):
        raise DpoCacheError(f"--key {key[:100]} is no key", expected="up to 64 hexadecimal digits")
    with closing(PairLookup(cache)) as lookup:
        found = lookup.keys_beginning_with(wanted)
        if len(found) != 1:
            raise DpoCacheError(
                f"{len(found) or 'no'} pairs of {cache.path} have a key that begins with {wanted}",
                expected="enough digits to name one pair",
                next_step=f"dpo-cache show {as_argument(cache.path)} prints pairs with their keys",
            )
        row = lookup.find(found[0])
    assert row is not None, "the key comes from the same index"
    return row

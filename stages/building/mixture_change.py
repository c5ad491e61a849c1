"""What a build makes of the mixture of its name: new, unchanged, described anew, replaced or extended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import DpoCacheError, as_argument
from ...pipeline.cache.cache_folder import ReferenceCache
from ...pipeline.cache.canonical_json import canonical_bytes
from ...pipeline.cache.example_key import Keys, name_keys
from ...pipeline.cache.key_index import KeyIndex
from ...pipeline.cache.mixture import Mixture
from ...pipeline.cache.mixture_rows import MixtureRows
from ...pipeline.cache.mixture_table import training_set_digest
from ...pipeline.cache.unreadable_file import UnreadableFileError
from ...pipeline.data.dataset_spec import DatasetSpec
from ..console.terminal import say
from .build_config import BuildConfig
from .left_out import recorded_keys
from .mixture_content import MixtureContent
from .mixture_union import united
from .pair_collection import CollectedPairs
from .tokenization_difference import differing_settings, settings_in_words


def mixture_content(
    cache: ReferenceCache, config: BuildConfig, content: MixtureContent, *, known: KeyIndex
) -> MixtureContent:
    """What the mixture is to hold after this build.

    Where it holds the same pairs already, only what is recorded of them is brought up to date: a pointer says how the
    last build of its name made them.

    Args:
        cache: The cache.
        config: Names the mixture, and what shall become of one that has other pairs.
        content: The pairs of this build.
        known: The keys that the cache holds.

    Raises:
        DpoCacheError: The cache has a mixture of this name with other pairs, and neither ``--replace`` nor
            ``--extend`` says what shall become of it; or ``--extend`` would mix two ways of making tokens, or add to
            a mixture that is damaged or whose own pairs are lost.
    """
    if config.mixture not in cache.mixture_names():
        return content
    existing: Mixture | None = None
    try:
        existing = cache.read_mixture(config.mixture)
        existing.table.verify()
    except DpoCacheError as error:
        if config.extend or isinstance(error, UnreadableFileError):
            raise
        if existing is not None and not config.replace:
            _refuse_others_in_place_of(existing, content, error)
        say(f"warning: mixture {config.mixture} is written anew: {error.found}")
        return content
    is_whole = {shard.file_name for shard in existing.shards} <= {path.name for path in cache.shards.paths()}
    is_whole &= existing.has_token_logps or not config.token_logps
    if config.extend:
        extended = _extended(existing, content, known)
        return replace(extended, is_new=extended.is_new or not is_whole)
    if _same_pairs(existing.rows(), content.rows):
        return replace(content, is_new=not is_whole or not _says_the_same(existing, content))
    if config.replace:
        return content
    raise _changed(existing, content, config)


def left_out_before(cache: ReferenceCache, config: BuildConfig, collected: CollectedPairs) -> CollectedPairs:
    """With ``--drop-nonfinite``, the pairs without those that the mixture of this name leaves out already."""
    if not config.drop_nonfinite or config.mixture not in cache.mixture_names():
        return collected
    try:
        existing = cache.read_mixture(config.mixture)
    except DpoCacheError:  # damaged: they are scored again
        return collected
    return collected.without(recorded_keys(existing.sources))


def _refuse_others_in_place_of(existing: Mixture, content: MixtureContent, damage: DpoCacheError) -> None:
    """A build of the same pairs mends a mixture whose table is damaged: the pointer still tells their digest."""
    rows, _ = content.rows.in_mixture_order()
    if training_set_digest(rows.example_keys) != existing.digest:
        raise DpoCacheError(
            f"mixture {existing.name} has other training pairs ({existing.num_pairs}) than this build makes "
            f"({len(rows)}), and is damaged: {damage.found}",
            expected="the same pairs, or --replace or another --mixture",
            next_step=f"to mend it, build it once more from its own datasets: {_datasets_of(existing)}; to put these "
            "pairs in their place, add --replace",
        )


def _extended(existing: Mixture, added: MixtureContent, known: KeyIndex) -> MixtureContent:
    """The existing rows and those of the added ones that it does not have: repeating the command adds nothing."""
    differing = differing_settings(existing.tokenization, added.tokenization)
    if differing:
        raise DpoCacheError(
            f"mixture {existing.name} was made with other tokens: {settings_in_words(differing)}",
            expected="the same settings for all pairs of a mixture",
            next_step="repeat the command with the mixture's settings, or give these pairs another --mixture",
        )
    before = MixtureContent.of(existing)
    _refuse_lost_pairs(existing, before, added, known)
    both = united([before, added])
    num_added = len(both.rows) - len(before.rows)
    return replace(
        both,
        is_new=num_added > 0 or len(both.sources) > len(before.sources),
        already_there=len(added.rows) - num_added,
        repeated=_num_repeated(before, both),
    )


def _num_repeated(before: MixtureContent, both: MixtureContent) -> int:
    """How many of the rows that ``both`` adds to ``before`` have a pair that was there."""
    return int(np.isin(both.rows.example_keys, before.rows.example_keys).sum()) - len(before.rows)


def _refuse_lost_pairs(existing: Mixture, before: MixtureContent, added: MixtureContent, known: KeyIndex) -> None:
    """Pairs that stand in no shard can be scored again only from the rows they were made of."""
    keys: Keys = np.unique(before.rows.example_keys)
    lost = keys[(known.find(keys) < 0) & ~np.isin(keys, added.rows.example_keys)]
    if len(lost):
        raise DpoCacheError(
            f"{len(lost)} pairs of mixture {existing.name} are in no shard that can be used: {name_keys(lost)}",
            expected="a whole mixture to add to",
            next_step="build it once more from all its datasets, with the same options; only what is lost is scored: "
            f"dpo-cache build --mixture {existing.name} --replace {_datasets_of(existing)} …",
        )


def _datasets_of(mixture: Mixture) -> str:
    """A mixture's datasets as they are given on the command line."""
    return " ".join(f"--dataset {as_argument(_spec_of(source))}" for source in mixture.sources)


def _spec_of(source: dict[str, Any]) -> str:
    """A dataset's record as it is given on the command line."""
    options = {name: str(source[name]) for name in ("config", "revision", "amount") if source.get(name)}
    if source.get("split") not in (None, "train"):
        options["split"] = str(source["split"])
    return str(DatasetSpec(path=str(source.get("path") or "UNKNOWN"), **options))


def _same_pairs(ours: MixtureRows, theirs: MixtureRows) -> bool:
    return np.array_equal(np.sort(ours.example_keys), np.sort(theirs.example_keys))


def _says_the_same(existing: Mixture, content: MixtureContent) -> bool:
    ours = [existing.tokenization, existing.sources, existing.dropped]
    return canonical_bytes(ours) == canonical_bytes([content.tokenization, content.sources, content.dropped])


def _changed(existing: Mixture, content: MixtureContent, config: BuildConfig) -> DpoCacheError:
    old, new = np.unique(existing.rows().example_keys), np.unique(content.rows.example_keys)
    kept = len(np.intersect1d(old, new))
    differing = differing_settings(existing.tokenization, content.tokenization)
    otherwise_made = f"; made with other settings: {settings_in_words(differing)}" if differing else ""
    left_out = np.concatenate([np.empty(0, dtype=new.dtype), *recorded_keys(existing.sources).values()])
    again = len(np.intersect1d(new, left_out))
    replacing = (
        "to put these pairs in place of the old ones" if kept < len(old) else "to have no other pairs than these"
    )
    # A mixture has one way of making tokens: pairs made otherwise cannot be added to it.
    extending = "" if differing else _extending(existing, content)
    return DpoCacheError(
        f"mixture {config.mixture} has {existing.num_pairs} training pairs, this build makes {len(content.rows)}: "
        f"{len(new) - kept} are new and {len(old) - kept} are gone{otherwise_made}",
        expected=f"the same pairs, or --replace{', --extend' if extending else ''} or another --mixture",
        next_step=(f"add --drop-nonfinite to leave out {again} as before; else " if again else "")
        + f"add --replace {replacing}{extending}, or --mixture OTHER to keep both; pairs that are in the cache are "
        "reused in each case",
    )


def _extending(existing: Mixture, content: MixtureContent) -> str:
    """``--extend`` as one of the next steps, with what it would repeat."""
    before = MixtureContent.of(existing)
    repeated = _num_repeated(before, united([before, content]))
    repeating = f" ({repeated} that are there already are then trained on once more per epoch)" if repeated else ""
    return f", --extend to add them{repeating}"

"""The datasets of a build, an import or an explanation, from their names to training pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...pipeline.cache.key_index import KeyIndex
from ...pipeline.data.dataset_source import DatasetSource, open_dataset
from ...pipeline.data.dataset_spec import DatasetSpec
from ..console.terminal import say
from .build_config import BuildConfig
from .build_reference import BuildReference
from .pair_collection import CollectedPairs
from .pair_collector import collect_pairs

SPOOL = "pairs.arrow"


def open_datasets(config: BuildConfig) -> list[DatasetSource]:
    """The datasets of a build, in order."""
    return [open_dataset(DatasetSpec.parse(text)) for text in config.dataset]


def collect_datasets(
    config: BuildConfig,
    reference: BuildReference,
    datasets: Sequence[DatasetSource],
    *,
    known: KeyIndex | None,
    scratch: Path,
) -> CollectedPairs:
    """Tokenise the datasets of a build; the tokens of pairs that are not ``known`` lie in ``scratch / SPOOL`` then."""
    return collect_pairs(
        datasets,
        reference.tokenization,
        vocab_size=reference.vocab_size,
        known=known,
        spool=scratch / SPOOL,
        max_unusable_share=config.max_unusable_share,
        say_unusable=say if config.verbose else None,
    )

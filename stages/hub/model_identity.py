"""Identifying a model as a given reference was identified, to hold one against the other."""

from __future__ import annotations

from ...pipeline.cache.reference_identity import ReferenceIdentity, identify_reference
from ...pipeline.scoring.pair_scorer import SCORING_VERSION
from .model_folder import ModelFolder


def identity_to_compare(
    model: ModelFolder, reference: ReferenceIdentity, *, trust_remote_code: bool
) -> ReferenceIdentity:
    """What a model's values would depend on if this code computed them with the numerics of ``reference``.

    Raises:
        DpoCacheError: The files are no model that we can identify.
    """
    return identify_reference(
        model.folder,
        adapter_folder=model.adapter_folder,
        weight_dtype=reference.weight_dtype,
        compute_dtype=reference.compute_dtype,
        attention=reference.attention,
        scoring_version=SCORING_VERSION,
        quantization=reference.quantization,
        trust_remote_code=trust_remote_code,
    )

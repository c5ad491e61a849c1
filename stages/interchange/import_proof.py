"""A sample of imported values, held against the reference that is said to have given them.

Shapes: S pairs of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DpoCacheError
from ...pipeline.data.token_pair import TokenPair
from ...pipeline.scoring.reference_scorer import load_scorer, score_pairs
from ...pipeline.scoring.scoring_batch import Layout
from ...pipeline.scoring.side_bounds import long_side_bound, side_bounds
from ..building.build_reference import BuildReference
from ..processes.devices import device_of_rank, gpu_explained
from .import_config import ImportConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpread:
    """How far imported values are from the reference's own: ``|theirs − ours| / scored tokens`` of a side, in nats.

    Attributes:
        pairs: Size of the sample.
        mean_per_token: Over all sides.
        max_per_token: Of the worst side.
        bound_per_token: The largest allowed of a side that is not short, as in training's step-0 proof.
    """

    pairs: int
    mean_per_token: float
    max_per_token: float
    bound_per_token: float


def prove_values(
    path: Path,
    pairs: Sequence[TokenPair],
    values_S2: npt.NDArray[np.float64],
    config: ImportConfig,
    reference: BuildReference,
) -> SampleSpread:
    """Score a sample with the reference, and refuse values that are not what it gives.

    Args:
        path: The source, for messages.
        pairs: The sample.
        values_S2: Chosen and rejected of each, as the source has them.
        config: What the values are said to be.
        reference: Whose they are said to be.

    Raises:
        DpoCacheError: They are further from the reference's own than rounding explains.
    """
    ours_S2 = _score(pairs, reference, trust_remote_code=config.trust_remote_code)
    tokens_S2 = np.array([(pair.chosen_tokens, pair.rejected_tokens) for pair in pairs])
    apart_S2 = {
        "sums": np.abs(values_S2 - ours_S2) / tokens_S2,
        "averages": np.abs(values_S2 - ours_S2 / tokens_S2),
    }
    dtype = reference.identity.compute_dtype
    bounds_S2, bound = side_bounds(dtype, tokens_S2), long_side_bound(dtype)
    stated = apart_S2.pop(config.values)
    spread = SampleSpread(
        pairs=len(pairs),
        mean_per_token=float(stated.mean()),
        max_per_token=float(stated.max()),
        bound_per_token=bound,
    )
    if (stated <= bounds_S2).all():
        return spread
    ((other, apart),) = apart_S2.items()
    if (apart <= bounds_S2).all():
        raise DpoCacheError(f"{path} holds {other}, not {config.values}", next_step=f"add --values {other}")
    raise DpoCacheError(
        f"{path} is not what the reference gives: on a sample of {len(pairs)} pairs they differ by "
        f"{spread.max_per_token:.3g} nats per token at most, {spread.mean_per_token:.3g} in the mean",
        expected=f"at most {bound:g} in {dtype}",
        next_step="what usually differs is the model, the order of the rows, the template, mask or length that made "
        "the tokens, or --dtype; to score instead: dpo-cache build",
    )


@gpu_explained("import on a machine with more GPU memory, or on the CPU: CUDA_VISIBLE_DEVICES= dpo-cache import …")
def _score(
    pairs: Sequence[TokenPair], reference: BuildReference, *, trust_remote_code: bool
) -> npt.NDArray[np.float64]:
    """Chosen and rejected sums of each pair, one pair at a time, shape (S, 2)."""
    device, model, identity = device_of_rank(0), reference.model, reference.identity
    scorer = load_scorer(
        model.folder,
        dtype=identity.compute_dtype,
        attention=identity.attention,
        device=device,
        adapter=model.adapter_folder,
        quantization=identity.quantization,
        trust_remote_code=trust_remote_code,
    )
    return np.concatenate([score_pairs(scorer, [pair], Layout.PADDED, device)[:, :2] for pair in pairs])

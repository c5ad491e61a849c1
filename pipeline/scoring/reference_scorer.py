"""The reference as what scores pairs: loading it, and the values of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..data.token_pair import TokenPair
from .layouts import scoring_batch
from .model_loading import load_causal_lm
from .pair_scorer import PairScorer
from .scoring_batch import Layout


def load_scorer(
    folder: str | Path,
    *,
    dtype: str,
    attention: str,
    device: torch.device,
    adapter: str | Path | None,
    quantization: str | None,
    trust_remote_code: bool,
) -> PairScorer:
    """Load a reference in evaluation mode; see :func:`~.model_loading.load_causal_lm`.

    Args:
        folder: The model's files.
        dtype: Of the weights and of the computation, as an identity spells it: ``bfloat16``.
        attention: The attention kernel.
        device: Where the weights go.
        adapter: A folder with a peft adapter on top of them.
        quantization: What the weights are quantized to; None to leave them as they are.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        DpoCacheError: The model cannot be loaded, or its vocabulary head is no plain linear layer.
    """
    model = load_causal_lm(
        folder,
        dtype=getattr(torch, dtype),
        attention=attention,
        device=device,
        adapter=adapter,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    return PairScorer(model).eval()


@torch.inference_mode()
def score_pairs(
    scorer: PairScorer, pairs: Sequence[TokenPair], layout: Layout, device: torch.device
) -> npt.NDArray[np.float64]:
    """The four values of each pair of one batch, in the order of ``VALUE_COLUMNS``, shape (pairs, 4)."""
    values: npt.NDArray[np.float64] = scorer(scoring_batch(pairs, layout).to(device)).stacked_sums.cpu().numpy()
    return values

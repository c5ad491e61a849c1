"""How far apart rounding alone may bring two passes over the same tokens by the same weights.

Shape suffix: S sides.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy.typing as npt
from torch import Tensor

BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
"""In nats per scored token of a side long enough for its tokens to average out, by the dtype computed in.

Float32 rounds at 6e-8 relative, and logits of some tens through some tens of layers end some 1e-6 apart; what is
systematic, such as one wrong token in a thousand, is above 1e-3. Bfloat16 rounds at 4e-3, one token's logp moves by
up to 1e-1 between batch shapes, and the average of 16 tokens by up to 1e-2.
"""

AVERAGING_TOKENS = 16
"""Scored tokens from which on :data:`BOUNDS` holds in bfloat16.

Rounding errors of tokens are nearly independent, so the error of an average falls with the root of their number.
Measured in bfloat16 (Llama of 12 and 24 layers, width 512, each pair alone against eight batches): the largest
distance per token was 0.045 on sides of one token, 0.041 of two, 0.027 of four, and 0.0075 of sixteen.
"""

Counts = TypeVar("Counts", Tensor, npt.NDArray[Any])


def long_side_bound(dtype: str) -> float:
    """The bound on a side of at least :data:`AVERAGING_TOKENS` tokens, and on the mean over sides of any length."""
    return BOUNDS.get(dtype, BOUNDS["bfloat16"])


def side_bounds(dtype: str, tokens_S: Counts) -> Counts:
    """The largest distance allowed of each side, in nats per scored token.

    In float32 the bound is far above the rounding of a single token, so it is the same for every length.

    Args:
        dtype: Computed in; one without a bound of its own has that of bfloat16.
        tokens_S: Scored tokens of each side, at least 1.
    """
    growth_S = (AVERAGING_TOKENS / tokens_S) ** (0.0 if dtype == "float32" else 0.5)
    return long_side_bound(dtype) * growth_S.clip(min=1)
